//! Errors as the CNI specification wants them (section 5, "Error").

use serde_json::{Value, json};

/// Why a call cannot be answered. A pod is not failed by it, but by a configuration that has nothing to hand on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CniError {
    /// A variable of the environment is missing or makes no sense.
    #[error(
        "the environment variable {0} is missing or makes no sense: {1:?}; the container runtime sets it"
    )]
    Environment(&'static str, String),
    /// The standard input is no network configuration.
    #[error("the network configuration cannot be read: {0}")]
    Unreadable(String),
    /// It stands first, or alone, in the list of plugins.
    #[error(
        "there is no prevResult to hand on: landfall-cni makes no interface; put it behind the plugin that does, in the \
         same list of plugins (conflist)"
    )]
    NotChained,
}

impl CniError {
    fn code(&self) -> u32 {
        match self {
            Self::Environment(..) => 4,
            Self::Unreadable(_) => 6,
            Self::NotChained => 7,
        }
    }

    /// What is printed.
    pub fn result(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "code": self.code(),
            "msg": "landfall-cni: the call cannot be answered",
            "details": self.to_string(),
        })
    }
}
