//! nftables tables besides Landfall's.

use landfall_lab::Netns;

/// A table of this test's in a host, for a while.
pub(crate) struct Table<'a>(&'a Netns, &'a str);

impl<'a> Table<'a> {
    pub(crate) fn load(host: &'a Netns, name: &'a str, chains: &str) -> Self {
        host.nft(&format!("table inet {name} {{\n{chains}\n}}\n"))
            .unwrap();
        Self(host, name)
    }

    /// What a named counter of it has counted.
    pub(crate) fn packets(&self, counter: &str) -> u64 {
        let counter = format!("inet {} {counter}", self.1);
        self.0.counted(&counter).unwrap()
    }
}

impl Drop for Table<'_> {
    fn drop(&mut self) {
        let _ = self.0.nft(&format!("delete table inet {}\n", self.1));
    }
}
