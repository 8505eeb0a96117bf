//! What a Service wants, in the terms of allocation.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::refusal::Refusal;
use crate::ip::Family;
use crate::model::{FamilyPolicy, Service};

/// The class of Services that are ours by name.
pub const CLASS: &str = "landfall.dev/l2";

/// What a Service wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Want {
    /// The families, the primary one first.
    pub(super) families: Vec<Family>,
    /// Whether one family of two will do.
    pub(super) partial: bool,
    /// Addresses asked for by number.
    pub(super) explicit: BTreeMap<Family, IpAddr>,
    /// The pool asked for by name.
    pub(super) pool: Option<String>,
    /// What is wrong with the request: what is held may stay, nothing new is given.
    pub(super) flaw: Option<Refusal>,
}

impl Want {
    pub(super) fn of(service: &Service) -> Self {
        let request = &service.request;
        let mut flaw = request.malformed.clone().map(Refusal::Malformed);
        let mut families = service.families.clone();
        if families.is_empty() {
            // Only a manifest can leave this open; the API server always says.
            families = request.addresses.iter().copied().map(Family::of).collect();
            if families.is_empty() {
                families.push(Family::V4);
            }
            families.dedup();
        }
        let mut explicit = BTreeMap::new();
        for &address in &request.addresses {
            let family = Family::of(address);
            if !families.contains(&family) {
                flaw.get_or_insert(Refusal::WrongFamily(address));
            } else if explicit
                .insert(family, address)
                .is_some_and(|before| before != address)
            {
                flaw.get_or_insert(Refusal::TwoOfAFamily(family));
            }
        }
        Self {
            partial: service.family_policy != FamilyPolicy::RequireDualStack,
            families,
            explicit,
            pool: request.pool.clone(),
            flaw,
        }
    }
}
