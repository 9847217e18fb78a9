//! A disk in memory that loses power, for tests.
//!
//! It keeps two images: the live one, which the process sees (the page cache), and the durable one
//! (the platter). What a loss of power leaves is decided by a seed, or by the caller choice by
//! choice:
//!
//! - A sector of 512 bytes that was written since its file's last sync holds what it held durably,
//!   or what any write since has left in it, independently of all other sectors.
//! - A file that grew since its last sync has its durable length or one of its lengths since.
//! - Names created, renamed or removed since the last sync of the directory persist up to one point
//!   of their order; syncing a file says nothing about its name. With
//!   [`set_loose_directory`](SimDisk::set_loose_directory), any subset of them persists.
//! - A mapped region is its file's live contents. A sector of it is the durable one or the one at
//!   the instant of the loss; or, after [`write_back`](SimDisk::write_back), the one then, or
//!   partly the one then and partly a later one.
//!
//! A SIGKILL loses nothing. Handles and regions of the process that died are cut off: calls fail,
//! and stores of its threads reach nobody. What those threads store *during* [`kill`] and its like
//! is caught word by word, not at one instant, as a processor would; a test that cares has none.
//!
//! Not modelled: holes (a file takes the space of its length), sectors of files torn inside, a sync
//! that stores a part before it fails.
//!
//! [`kill`]: SimDisk::kill

#[cfg(test)]
mod cache_tests;
mod cut;
mod fault;
mod names;
mod node;
mod process;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use parking_lot::Mutex;

use self::cut::Settle;
pub(crate) use self::cut::{Choice, Outcomes, SplitMix64, Undecided};
use self::fault::Faults;
pub(crate) use self::fault::{Call, Fault, Outcome};
use self::names::Names;
use self::node::Node;
use self::process::{SimStorage, disk_full};
use super::Storage;

/// What the file system calls an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct NodeId(u64);

/// The disk. It outlives the processes that use it, one at a time.
#[derive(Debug)]
pub(crate) struct SimDisk {
    state: Mutex<State>,
}

/// The state of a disk, with what is not durable yet: a point from which a test explores several
/// outcomes.
#[derive(Debug)]
pub(crate) struct Image {
    nodes: BTreeMap<NodeId, Node>,
    names: Names,
    next_node: u64,
    capacity: u64,
    is_loose: bool,
    /// How often power was lost.
    cuts: u64,
}

#[derive(Debug)]
struct State {
    image: Image,
    random: SplitMix64,
    /// Handles of any other number are dead.
    process: u64,
    /// An injected crash has happened; the process is dead, and nobody has looked yet.
    has_crashed: bool,
    faults: Faults,
}

impl SimDisk {
    /// An empty disk. All that is left to chance follows from the seed and the order of calls.
    pub(crate) fn new(seed: u64) -> Arc<Self> {
        Self::with(Image::empty(), seed)
    }

    /// Another disk in the state of the image. No process, no faults, no calls counted yet.
    pub(crate) fn from_image(image: &Image, seed: u64) -> Arc<Self> {
        Self::with(image.detached(), seed)
    }

    fn with(image: Image, seed: u64) -> Arc<Self> {
        let random = SplitMix64::new(seed);
        let faults = Faults::default();
        let state = State { image, random, process: 0, has_crashed: false, faults };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// The state of the disk, at one instant if no other thread stores into a region.
    pub(crate) fn snapshot_image(&self) -> Image {
        self.state.lock().image.detached()
    }

    /// Starts a process. The one before it, if it is still there, is killed.
    pub(crate) fn storage(self: &Arc<Self>) -> Arc<dyn Storage> {
        let mut state = self.state.lock();
        state.end_process();
        Arc::new(SimStorage { disk: Arc::clone(self), process: state.process })
    }

    /// SIGKILL: the live image stays as it is.
    pub(crate) fn kill(&self) {
        self.state.lock().end_process();
    }

    /// Loss of power, decided by the seed. The extremes (nothing persists, everything does) are as
    /// likely as what lies between.
    pub(crate) fn power_cut(&self) {
        let mut state = self.state.lock();
        let mut random = state.random.clone();
        // How many of eight undecided things are not what they were durably.
        let persisting = [0, 1, 4, 7, 8][random.index(5)];
        state.cut(&mut |choice| match random.index(8) {
            at if at >= persisting => 0,
            _ if persisting == 8 || random.index(2) == 0 => choice.newest,
            _ => random.index(choice.options),
        });
        state.random = random;
    }

    /// Loss of power, decided by `choose`: it is asked for each undecided thing, in an order that
    /// depends on its answers only, for one of `0..options`; what is above counts as the last.
    /// 0 is what was durable. `choose` must not call the disk.
    pub(crate) fn power_cut_with(&self, choose: &mut dyn FnMut(&Choice<'_>) -> usize) {
        self.state.lock().cut(choose);
    }

    /// Every disk that a loss of power could leave now, one after the other. Their number is
    /// exponential in what is not durable yet: look at [`dirty_sectors`](Self::dirty_sectors), or
    /// `take` some.
    pub(crate) fn outcomes(&self) -> Outcomes {
        Outcomes::new(self.snapshot_image())
    }

    /// How many sectors a loss of power could leave in more than one way.
    pub(crate) fn dirty_sectors(&self) -> usize {
        let mut state = self.state.lock();
        state.image.pull();
        let named = state.image.names.reachable();
        let nodes = named.iter().filter_map(|id| state.image.nodes.get(id));
        nodes.map(Node::undecided_sectors).sum()
    }

    /// The page cache drops what it may: of what a failed sync has lost, and nobody has written
    /// again, reads show from now on what is durable. Whether that was anything.
    pub(crate) fn evict(&self) -> bool {
        let mut was_anything = false;
        for node in self.state.lock().image.nodes.values_mut() {
            was_anything |= node.evict();
        }
        was_anything
    }

    /// The kernel begins to write mapped pages back, unasked: a loss of power may leave a sector of
    /// a region as it is now, too, or a part of it so and the rest as it came to be.
    pub(crate) fn write_back(&self) {
        self.state.lock().image.nodes.values_mut().for_each(Node::write_back);
    }

    /// From now on, names that are not durable persist in any subset, not only up to a point.
    pub(crate) fn set_loose_directory(&self, is_loose: bool) {
        self.state.lock().image.is_loose = is_loose;
    }

    /// The bytes that all files may have together. Above it the disk is full; what is there stays.
    pub(crate) fn set_capacity(&self, bytes: u64) {
        self.state.lock().image.capacity = bytes;
    }

    /// Lets a later call fail.
    pub(crate) fn inject(&self, fault: Fault) {
        self.state.lock().faults.inject(fault);
    }

    /// The process dies at the `nth` call from now (0 is the next one): that call and all later
    /// ones fail without effect, and regions are cut off at that instant. What the process does
    /// afterwards, in memory, nobody has seen: see [`has_crashed`](Self::has_crashed).
    pub(crate) fn crash_at(&self, nth: u64) {
        self.inject(Fault::new(Call::Any, nth, Outcome::Crash));
    }

    /// The same, but that a write which is the `nth` call leaves so many of 256 parts, in whole
    /// sectors: a process that is killed in a large write may have got through a part of it.
    pub(crate) fn crash_within(&self, nth: u64, parts: u8) {
        self.inject(Fault::new(Call::Any, nth, Outcome::CrashWithin(parts)));
    }

    /// Whether an injected crash has happened to the present process. An operation that returned
    /// before this was seen to be false was acknowledged before the crash.
    pub(crate) fn has_crashed(&self) -> bool {
        self.state.lock().has_crashed
    }

    /// Forgets the faults that have not happened yet.
    pub(crate) fn clear_faults(&self) {
        self.state.lock().faults.clear();
    }

    /// Calls of all kinds that living processes have made, those that failed included.
    pub(crate) fn calls(&self) -> u64 {
        self.state.lock().faults.calls()
    }

    /// The names of the files, sorted.
    pub(crate) fn file_names(&self) -> Vec<String> {
        self.state.lock().image.names.live().map(|(name, _)| name.to_owned()).collect()
    }

    /// The live contents of a file.
    pub(crate) fn file(&self, name: &str) -> Option<Vec<u8>> {
        let mut state = self.state.lock();
        let id = state.image.names.find(name)?;
        state.image.nodes.get_mut(&id).map(|node| node.contents().to_vec())
    }

    /// Puts a file there, name and contents durable, in place of what has the name.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) {
        let mut state = self.state.lock();
        let id = state.image.add(Node::durable(bytes.to_vec()));
        state.image.names.put(name, id);
        state.image.forget_unreachable();
    }

    /// Takes a file away, durably. Whether it was there.
    pub(crate) fn delete(&self, name: &str) -> bool {
        let mut state = self.state.lock();
        let was_there = state.image.names.delete(name);
        state.image.forget_unreachable();
        was_there
    }

    /// Rot: flips bits of a byte, on the platter and in the page cache.
    ///
    /// # Errors
    /// `NotFound`; `UnexpectedEof` where the file has no such byte.
    pub(crate) fn corrupt(&self, name: &str, offset: u64, xor: u8) -> io::Result<()> {
        let mut state = self.state.lock();
        let id = state.image.names.find(name).ok_or(ErrorKind::NotFound)?;
        state.image.node(id)?.corrupt(node::position(offset)?, xor)
    }
}

impl State {
    /// The process is dead: what it stored into regions is taken, what it stores later is not.
    fn end_process(&mut self) {
        self.image.detach();
        self.process += 1;
        self.has_crashed = false;
    }

    fn crash(&mut self) {
        self.image.detach();
        self.has_crashed = true;
    }

    fn cut(&mut self, choose: &mut dyn FnMut(&Choice<'_>) -> usize) {
        self.end_process();
        self.image.cuts += 1;
        let mut settle = Settle { choose };
        self.image.names.settle(self.image.is_loose, &mut settle);
        self.image.forget_unreachable();
        for (name, id) in self.image.names.live() {
            if let Some(node) = self.image.nodes.get_mut(&id) {
                *node = Node::durable(node.settle(name, &mut settle));
            }
        }
    }
}

impl Image {
    fn empty() -> Self {
        let names = Names::default();
        Self {
            nodes: BTreeMap::new(),
            names,
            next_node: 0,
            capacity: u64::MAX,
            is_loose: false,
            cuts: 0,
        }
    }

    /// A copy that shares nothing.
    fn detached(&self) -> Self {
        let nodes = self.nodes.iter().map(|(&id, node)| (id, node.detached())).collect();
        let mut copy = Self { nodes, names: self.names.clone(), ..*self };
        copy.forget_unreachable();
        copy
    }

    /// Cuts the process off from all files.
    fn detach(&mut self) {
        for node in self.nodes.values_mut() {
            node.detach();
        }
        self.forget_unreachable();
    }

    /// Takes what was stored into regions.
    fn pull(&mut self) {
        for node in self.nodes.values_mut() {
            node.pull();
        }
    }

    fn add(&mut self, node: Node) -> NodeId {
        let id = NodeId(self.next_node);
        self.next_node += 1;
        self.nodes.insert(id, node);
        id
    }

    fn node(&mut self, id: NodeId) -> io::Result<&mut Node> {
        self.nodes.get_mut(&id).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn find(&mut self, name: &str) -> io::Result<(NodeId, &mut Node)> {
        let id = self.names.find(name).ok_or(ErrorKind::NotFound)?;
        Ok((id, self.node(id)?))
    }

    /// Files that nothing leads to any more are gone.
    fn forget_unreachable(&mut self) {
        let named = self.names.reachable();
        self.nodes.retain(|id, node| node.is_in_use() || named.contains(id));
    }

    /// The bytes that the file can still grow by. A removed file takes space while it is in use.
    fn room(&self) -> u64 {
        let live: Vec<NodeId> = self.names.live().map(|(_, id)| id).collect();
        let counts = |(id, node): &(&NodeId, &Node)| node.is_in_use() || live.contains(id);
        let used: u64 = self.nodes.iter().filter(counts).map(|(_, node)| node.len()).sum();
        self.capacity.saturating_sub(used)
    }

    /// Writes what there is room for.
    fn write(&mut self, id: NodeId, bytes: &[u8], offset: u64) -> io::Result<()> {
        node::position(offset.saturating_add(bytes.len() as u64))?;
        let room = self.room();
        let node = self.node(id)?;
        let end_max = node.len().saturating_add(room);
        let fitting = usize::try_from(end_max.saturating_sub(offset)).unwrap_or(usize::MAX);
        let fits = fitting >= bytes.len();
        node.write(&bytes[..fitting.min(bytes.len())], node::position(offset)?);
        if fits { Ok(()) } else { Err(disk_full()) }
    }

    /// Reserves what there is room for: `fallocate` keeps the part that it got.
    fn allocate(&mut self, id: NodeId, len: u64) -> io::Result<()> {
        let room = self.room();
        let node = self.node(id)?;
        let len_max = node.len().saturating_add(room);
        node.grow(node::position(len.min(len_max))?);
        if len <= len_max { Ok(()) } else { Err(disk_full()) }
    }
}
