//! Tables that Services share.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::table::Table;
use crate::model::{NodeName, ObjectKey};

/// A table among [`Tables`]. Numbers are of this process only; one that is free again is given anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u32);

/// How many servable endpoints each node has, in lowest terms: twice as many everywhere spread flows alike.
type Distribution = BTreeMap<NodeName, u32>;

#[derive(Clone, Debug)]
struct Entry {
    table: Arc<Table>,
    distribution: Distribution,
    users: usize,
}

/// The tables of all Services, one for each distribution of endpoints over nodes.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    entries: BTreeMap<TableId, Entry>,
    by_distribution: BTreeMap<Distribution, TableId>,
    by_service: BTreeMap<ObjectKey, TableId>,
}

impl Tables {
    /// Says how many servable endpoints a Service has on each node; none at all forgets it. Returns its table.
    ///
    /// A table that only this Service used is changed in place, at the cost of the change.
    pub fn set(
        &mut self,
        service: &ObjectKey,
        endpoints: &BTreeMap<NodeName, u32>,
    ) -> Option<TableId> {
        let wanted = lowest_terms(endpoints);
        let before = self.by_service.get(service).copied();
        if wanted.is_empty() {
            self.by_service.remove(service);
            before.inspect(|id| self.leave(*id));
            return None;
        }
        if let Some(id) = before
            && self.entries[&id].distribution == wanted
        {
            return Some(id);
        }
        let id = match self.by_distribution.get(&wanted) {
            Some(id) => {
                let id = *id;
                self.join(id);
                before.inspect(|before| self.leave(*before));
                id
            }
            None => self.make(before, wanted),
        };
        self.by_service.insert(service.clone(), id);
        Some(id)
    }

    /// A Service's table.
    pub fn of(&self, service: &ObjectKey) -> Option<(TableId, &Arc<Table>)> {
        let id = *self.by_service.get(service)?;
        Some((id, &self.entries.get(&id)?.table))
    }

    /// All tables.
    pub fn iter(&self) -> impl Iterator<Item = (TableId, &Arc<Table>)> {
        self.entries.iter().map(|(id, entry)| (*id, &entry.table))
    }

    /// A table for a distribution that has none: the one the Service had, if it is the last there, else a copy of
    /// it with the difference.
    fn make(&mut self, before: Option<TableId>, wanted: Distribution) -> TableId {
        let alone = before
            .filter(|id| self.entries[id].users == 1)
            .and_then(|id| Some((id, self.entries.remove(&id)?)));
        let (id, mut table) = if let Some((id, entry)) = alone {
            self.by_distribution.remove(&entry.distribution);
            (id, entry.table)
        } else {
            let table = before.map(|id| self.entries[&id].table.clone());
            before.inspect(|id| self.leave(*id));
            (self.free_id(), table.unwrap_or_default())
        };
        apply(Arc::make_mut(&mut table), &wanted);
        self.by_distribution.insert(wanted.clone(), id);
        let entry = Entry {
            table,
            distribution: wanted,
            users: 1,
        };
        self.entries.insert(id, entry);
        id
    }

    fn join(&mut self, id: TableId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.users += 1;
        }
    }

    fn leave(&mut self, id: TableId) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        entry.users -= 1;
        if entry.users == 0
            && let Some(entry) = self.entries.remove(&id)
        {
            self.by_distribution.remove(&entry.distribution);
        }
    }

    fn free_id(&self) -> TableId {
        let mut next = 0;
        for id in self.entries.keys() {
            if id.0 != next {
                break;
            }
            next += 1;
        }
        TableId(next)
    }
}

/// Makes the table that of `wanted`, node by node. First what grows: no bucket is without a node in between.
fn apply(table: &mut Table, wanted: &Distribution) {
    let before: Distribution = table
        .weights()
        .map(|(node, weight)| (node.clone(), weight))
        .collect();
    for (node, weight) in wanted {
        table.set(node, *weight);
    }
    for node in before.keys().filter(|node| !wanted.contains_key(node)) {
        table.set(node, 0);
    }
}

fn lowest_terms(endpoints: &BTreeMap<NodeName, u32>) -> Distribution {
    let divisor = endpoints.values().copied().fold(0, gcd).max(1);
    endpoints
        .iter()
        .filter(|(_, number)| **number > 0)
        .map(|(node, number)| (node.clone(), number / divisor))
        .collect()
}

fn gcd(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
