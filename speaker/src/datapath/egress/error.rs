//! Why this node cannot be a gateway.

use std::io;

use super::super::pins::PinsError;
use super::super::tables::TablesError;
use super::super::uplink::UplinkError;

/// Why there is no gateway.
#[derive(Debug, thiserror::Error)]
pub(super) enum GatewayError {
    #[error(transparent)]
    Pins(#[from] PinsError),
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    #[error(transparent)]
    Tables(#[from] TablesError),
    #[error("looking through the bindings: {0}")]
    Keeper(#[from] io::Error),
}

impl From<aya::EbpfError> for GatewayError {
    fn from(error: aya::EbpfError) -> Self {
        Self::Uplink(error.into())
    }
}

impl From<aya::programs::ProgramError> for GatewayError {
    fn from(error: aya::programs::ProgramError) -> Self {
        Self::Uplink(error.into())
    }
}
