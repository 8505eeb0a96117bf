//! Keeps the routes of what leaves by policies: made before the table says so, taken away after.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::tool::ToolError;
use super::super::{Config, Rules};
use super::routes::{self, Asked, Table};
use super::ways::{self, Ways};

/// The routes, as far as they were made.
#[derive(Debug, Default)]
pub(in super::super) struct Routes {
    /// What they were made for; nothing while it is not known what there is.
    asked: Option<Asked>,
    ways: Ways,
    tables: Vec<Table>,
    /// What is there besides is to go.
    to_prune: bool,
    complaints: Vec<String>,
    /// The uplinks whose reverse-path filter was told to look at marks.
    told: BTreeSet<Arc<str>>,
}

impl Routes {
    /// The ways that have routes.
    pub(in super::super) fn ways(&self) -> &Ways {
        &self.ways
    }

    /// Makes the routes that the rules want, beside those that are there; whether the ways changed. If that fails there
    /// are no ways.
    pub(in super::super) async fn make(
        &mut self,
        rules: &Rules,
        config: &Config,
    ) -> Result<bool, ToolError> {
        let asked = routes::asked(rules);
        if self.asked.as_ref() == Some(&asked) {
            return Ok(false);
        }
        let before = std::mem::take(&mut self.ways);
        self.asked = None;
        let (ways, mut complaints) = ways::assigned(asked.ways(), &before, config);
        let (tables, missing) = routes::plan(&asked, &ways, config).await?;
        routes::install(&tables, config).await?;
        complaints.extend(missing);
        if complaints != self.complaints {
            for complaint in &complaints {
                tracing::warn!("{complaint}");
            }
            self.complaints = complaints;
        }
        for uplink in routes::answering(&tables) {
            if routes::ask_marks(&uplink) {
                self.told.insert(uplink);
            }
        }
        let changed = ways != before;
        self.ways = ways;
        self.tables = tables;
        self.asked = Some(asked);
        self.to_prune = true;
        Ok(changed)
    }

    /// Takes away what the table does not lead to any more.
    pub(in super::super) async fn prune(&mut self, config: &Config) -> Result<(), ToolError> {
        if !self.to_prune {
            return Ok(());
        }
        routes::prune(&self.tables, config).await?;
        let answering = routes::answering(&self.tables);
        for uplink in self
            .told
            .extract_if(.., |uplink| !answering.contains(uplink))
        {
            routes::ask_no_marks(&uplink);
        }
        self.to_prune = false;
        Ok(())
    }

    /// Whether they are what they should be, now that some route, rule or link changed. If not, the next call makes them.
    pub(in super::super) async fn are_right(&mut self, config: &Config) -> bool {
        let Some(asked) = &self.asked else {
            return false;
        };
        if self.tables.is_empty() {
            return true;
        }
        let planned = routes::plan(asked, &self.ways, config).await;
        let right = planned.is_ok_and(|(planned, _)| planned == self.tables)
            && routes::are_there(&self.tables, config)
                .await
                .unwrap_or(false);
        if !right {
            self.asked = None;
        }
        right
    }
}
