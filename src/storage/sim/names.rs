//! The directory: which names lead to which files, for the process and durably.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};

use super::NodeId;
use super::cut::{Settle, Undecided};

#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    live: BTreeMap<String, NodeId>,
    durable: BTreeMap<String, NodeId>,
    /// What happened since the last sync, in order.
    pending: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Create { name: String, node: NodeId },
    Rename { to: String, node: NodeId },
    Remove { name: String, node: NodeId },
}

impl Names {
    pub(super) fn find(&self, name: &str) -> Option<NodeId> {
        self.live.get(name).copied()
    }

    pub(super) fn live(&self) -> impl Iterator<Item = (&str, NodeId)> {
        self.live.iter().map(|(name, &node)| (name.as_str(), node))
    }

    /// The files that have a name, or may have one after a loss of power.
    pub(super) fn reachable(&self) -> BTreeSet<NodeId> {
        let pending = self.pending.iter().map(Change::node);
        self.live.values().chain(self.durable.values()).copied().chain(pending).collect()
    }

    pub(super) fn create(&mut self, name: &str, node: NodeId) {
        self.change(Change::Create { name: name.to_owned(), node });
    }

    pub(super) fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let node = self.find(from).ok_or(ErrorKind::NotFound)?;
        if from != to {
            self.change(Change::Rename { to: to.to_owned(), node });
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, name: &str) -> io::Result<()> {
        let node = self.find(name).ok_or(ErrorKind::NotFound)?;
        self.change(Change::Remove { name: name.to_owned(), node });
        Ok(())
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.live);
        self.pending.push(change);
    }

    pub(super) fn sync(&mut self) {
        for change in self.pending.drain(..) {
            change.apply(&mut self.durable);
        }
    }

    /// A sync failed: what is pending will never be stored.
    pub(super) fn lose(&mut self) {
        self.pending.clear();
    }

    /// In place of what has the name, durably.
    pub(super) fn put(&mut self, name: &str, node: NodeId) {
        self.delete(name);
        self.live.insert(name.to_owned(), node);
        self.durable.insert(name.to_owned(), node);
    }

    pub(super) fn delete(&mut self, name: &str) -> bool {
        let node = self.live.remove(name);
        self.durable.remove(name);
        // Else a later sync would bring it back.
        self.pending.retain(|change| Some(change.node()) != node);
        node.is_some()
    }

    /// Decides which of the pending changes persist; live is what is durable then.
    pub(super) fn settle(&mut self, is_loose: bool, settle: &mut Settle<'_>) {
        let pending = std::mem::take(&mut self.pending);
        if is_loose {
            for change in &pending {
                if settle.choose(Undecided::Name { file: change.name() }, 2, 1) == 1 {
                    change.apply(&mut self.durable);
                }
            }
        } else {
            let count = settle.choose(Undecided::Names, pending.len() + 1, pending.len());
            for change in &pending[..count] {
                change.apply(&mut self.durable);
            }
        }
        self.live = self.durable.clone();
    }
}

impl Change {
    fn node(&self) -> NodeId {
        match *self {
            Self::Create { node, .. } | Self::Rename { node, .. } | Self::Remove { node, .. } => {
                node
            }
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Create { name, .. }
            | Self::Rename { to: name, .. }
            | Self::Remove { name, .. } => name,
        }
    }

    /// Durably, changes before this one may be missing: whatever is left out, a name leads to one
    /// file, and a file has one name.
    fn apply(&self, names: &mut BTreeMap<String, NodeId>) {
        match self {
            Self::Create { name, node } => {
                names.entry(name.clone()).or_insert(*node);
            }
            Self::Rename { to, node } => {
                names.retain(|_, other| other != node);
                names.insert(to.clone(), *node);
            }
            Self::Remove { name, node } => {
                if names.get(name) == Some(node) {
                    names.remove(name);
                }
            }
        }
    }
}
