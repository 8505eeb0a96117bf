//! What the CNI plugin loads after the node's start, until this speaker's own table is there: the same table without any
//! pod, so that nobody begins a connection out of the cluster. It is in a file while there are policies.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::task::spawn_blocking;

use super::egress::{self, Ways};
use super::ruleset::{TABLE, elements};
use super::{Config, Rules};
use crate::egress::Egress;

/// Keeps the file.
#[derive(Debug, Default)]
pub(super) struct Boot {
    path: Option<PathBuf>,
    /// What is in it, as far as it is known; empty if it is not there.
    text: Option<String>,
}

impl Boot {
    /// In that place; in none if there is no plugin.
    pub(super) fn at(path: Option<PathBuf>) -> Self {
        Self { path, text: None }
    }

    /// Takes it away before rules go that judge: nobody is to load it then.
    pub(super) async fn before(&mut self, rules: &Rules) {
        if rules.egress.is_none() {
            self.set(String::new()).await;
        }
    }

    /// Writes it once rules are there that judge.
    pub(super) async fn after(&mut self, rules: Option<&Rules>, config: &Config) {
        if let Some(text) = rules.and_then(|rules| text(rules, config)) {
            self.set(text).await;
        }
    }

    async fn set(&mut self, text: String) {
        let Some(path) = self.path.clone() else {
            return;
        };
        if self.text.as_ref() == Some(&text) {
            return;
        }
        self.text = None;
        let content = text.clone();
        let done = spawn_blocking(move || match content.as_str() {
            "" => remove(&path),
            content => write(&path, content),
        });
        match done.await.map_err(io::Error::other).flatten() {
            Ok(()) => self.text = Some(text),
            Err(error) => tracing::warn!(
                path = %self.path.as_deref().unwrap_or(Path::new("")).display(),
                %error,
                "what the CNI plugin loads after the node's next start is not what it should be"
            ),
        }
    }
}

/// Takes the file away.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// As a whole, and so that it is there after a power failure.
fn write(path: &Path, text: &str) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let draft = path.with_extension("draft");
    let mut file = File::create(&draft)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(draft, path)
}

/// A script that makes the table, or fails if there is one of its name. Nothing if there is no policy.
fn text(rules: &Rules, config: &Config) -> Option<String> {
    let leaving = rules.egress.as_ref()?;
    let nobody = Egress {
        inside: leaving.egress.inside.clone(),
        ..Egress::default()
    };
    let rules = Rules {
        vips: rules.vips.clone(),
        egress: Some(Arc::new(super::Leaving {
            node: leaving.node.clone(),
            egress: Arc::new(nobody),
            uplinks: leaving.uplinks.clone(),
        })),
        ..Rules::default()
    };
    let mut text = format!(
        "create table inet {TABLE}
add set inet {TABLE} vips4 {{ type ipv4_addr; }}
add set inet {TABLE} vips6 {{ type ipv6_addr; }}
"
    );
    elements::<IpAddr>(&mut text, "add", "vips", &rules.vips);
    egress::whole(&mut text, &rules, &Ways::default(), config);
    Some(text)
}
