//! A disk that loses power at any write, and whose calls can fail.
//!
//! What was written is durable after a sync, names after a sync of names; until then a cut may leave all of it, nothing, or
//! any sectors of it. What is read comes from the cache, or, past it, from what the medium would have.

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::SmallRng};

use super::{Access, Disk, DiskFile, Identity};

/// What a power cut makes of writes that were not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Dropped,
    Kept,
    /// Any sectors of this many bytes arrived, in any order; and the first so many changes of names.
    Torn(usize),
    /// Names arrived and content did not, as journals of metadata have it.
    NamesOnly,
}

/// Calls of some kinds that fail with one error: so many, after so many that work.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    pub on: &'static [Call],
    pub after: u64,
    pub calls: u64,
    pub errno: rustix::io::Errno,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Open,
    Create,
    Rename,
    Remove,
    Read,
    Write,
    Size,
    Sync,
}

type Hook = Box<dyn Fn() + Send>;

/// A disk in memory; clones share it.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimDisk")
    }
}

#[derive(Default)]
struct State {
    nodes: Vec<Node>,
    /// As the file system has them in memory.
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    name_changes: Vec<NameChange>,
    /// Writes of any kind so far: where the power can be cut.
    writes: u64,
    cut_at: Option<u64>,
    fault: Option<Fault>,
    /// Calls that failed because they were told to.
    failed: u64,
    /// Raised by each cut; files that were open before are dead.
    life: u64,
    off: bool,
    on_cut: Option<Hook>,
}

#[derive(Default, Clone)]
struct Node {
    block_device: bool,
    cached: Vec<u8>,
    medium: Vec<u8>,
    /// Written and not synced, in order.
    changes: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Size(usize),
}

#[derive(Clone)]
enum NameChange {
    Add(PathBuf, usize),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

impl Default for SimDisk {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State::default())))
    }
}

impl SimDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A block device with this content, durably.
    pub fn add_device(&self, path: &str, content: Vec<u8>) {
        let mut state = self.state();
        let node = state.nodes.len();
        state.nodes.push(Node {
            block_device: true,
            cached: content.clone(),
            medium: content,
            changes: Vec::new(),
        });
        state.names.insert(path.into(), node);
        state.durable_names.insert(path.into(), node);
    }

    /// What the medium holds under a name.
    pub fn medium(&self, path: &str) -> Option<Vec<u8>> {
        let state = self.state();
        let node = *state.durable_names.get(Path::new(path))?;
        Some(state.nodes[node].medium.clone())
    }

    pub fn writes(&self) -> u64 {
        self.state().writes
    }

    /// Calls that failed as [`SimDisk::fail`] wanted.
    pub fn failed(&self) -> u64 {
        self.state().failed
    }

    /// Cuts the power during the n-th write from the beginning; `hook` runs at that moment.
    pub fn cut_at(&self, write: u64, hook: impl Fn() + Send + 'static) {
        let mut state = self.state();
        state.cut_at = Some(write);
        state.on_cut = Some(Box::new(hook));
    }

    pub fn fail(&self, fault: Option<Fault>) {
        self.state().fault = fault;
    }

    /// Does something for which the disk works.
    pub fn without_faults<T>(&self, work: impl FnOnce() -> T) -> T {
        let fault = self.state().fault.take();
        let result = work();
        self.state().fault = fault;
        result
    }

    pub fn is_off(&self) -> bool {
        self.state().off
    }

    /// The power comes back: what was not synced met its fate, and no file is open.
    pub fn power_on(&self, fate: Fate, seed: u64) {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut state = self.state();
        let state = &mut *state;
        for node in &mut state.nodes {
            for change in node.changes.drain(..) {
                match fate {
                    Fate::Dropped | Fate::NamesOnly => {}
                    Fate::Kept => change.apply(&mut node.medium),
                    Fate::Torn(sector) => change.tear(&mut node.medium, sector, &mut random),
                }
            }
            node.cached.clone_from(&node.medium);
        }
        let arrived = match fate {
            Fate::Dropped => 0,
            Fate::Kept | Fate::NamesOnly => state.name_changes.len(),
            Fate::Torn(_) => random.random_range(0..=state.name_changes.len()),
        };
        for change in state.name_changes.drain(..).take(arrived) {
            change.apply(&mut state.durable_names);
        }
        state.names.clone_from(&state.durable_names);
        state.life += 1;
        state.off = false;
    }
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Change::Write { offset, bytes } => {
                let end = offset + bytes.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*offset..end].copy_from_slice(bytes);
            }
            Change::Size(size) => content.resize(*size, 0),
        }
    }

    /// Each sector that the change touches arrives or does not.
    fn tear(&self, content: &mut Vec<u8>, sector: usize, random: &mut SmallRng) {
        let Change::Write { offset, bytes } = self else {
            if random.next_u32() & 1 == 1 {
                self.apply(content);
            }
            return;
        };
        let mut at = 0;
        while at < bytes.len() {
            let position = offset + at;
            let length = (sector - position % sector).min(bytes.len() - at);
            if random.next_u32() & 1 == 1 {
                let piece = Change::Write {
                    offset: position,
                    bytes: bytes[at..at + length].to_vec(),
                };
                piece.apply(content);
            }
            at += length;
        }
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            NameChange::Add(path, node) => {
                names.insert(path.clone(), *node);
            }
            NameChange::Rename(from, to) => {
                if let Some(node) = names.remove(from) {
                    names.insert(to.clone(), node);
                }
            }
            NameChange::Remove(path) => {
                names.remove(path);
            }
        }
    }
}

impl State {
    /// One call: fails if it is told to, or if there is no power.
    fn call(&mut self, call: Call) -> io::Result<()> {
        if self.off {
            return Err(io::Error::other("there is no power"));
        }
        let Some(fault) = self.fault.as_mut().filter(|fault| fault.on.contains(&call)) else {
            return Ok(());
        };
        if fault.after > 0 {
            fault.after -= 1;
        } else if fault.calls > 0 {
            fault.calls -= 1;
            self.failed += 1;
            return Err(fault.errno.into());
        }
        Ok(())
    }

    /// A write has begun: the power may go during it.
    fn during_write(&mut self) -> io::Result<()> {
        self.writes += 1;
        if self.cut_at == Some(self.writes) {
            self.off = true;
            if let Some(hook) = &self.on_cut {
                hook();
            }
            return Err(io::Error::other("the power was cut"));
        }
        Ok(())
    }

    fn change_name(&mut self, change: NameChange) -> io::Result<()> {
        change.apply(&mut self.names);
        self.name_changes.push(change);
        self.during_write()
    }

    fn change(&mut self, node: usize, change: Change) -> io::Result<()> {
        let node = &mut self.nodes[node];
        change.apply(&mut node.cached);
        node.changes.push(change);
        self.during_write()
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        self.names
            .get(path)
            .copied()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, _: Access) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.state();
        state.call(Call::Open)?;
        let (node, life) = (state.find(path)?, state.life);
        let disk = self.clone();
        Ok(Box::new(SimFile { disk, node, life }))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.state();
        state.call(Call::Create)?;
        if state.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let (node, life) = (state.nodes.len(), state.life);
        state.nodes.push(Node::default());
        state.change_name(NameChange::Add(path.into(), node))?;
        let disk = self.clone();
        Ok(Box::new(SimFile { disk, node, life }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.call(Call::Rename)?;
        state.find(from)?;
        state.change_name(NameChange::Rename(from.into(), to.into()))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.call(Call::Remove)?;
        state.find(path)?;
        state.change_name(NameChange::Remove(path.into()))
    }

    fn sync_names(&self, _: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.call(Call::Sync)?;
        state.during_write()?;
        let state = &mut *state;
        for change in state.name_changes.drain(..) {
            change.apply(&mut state.durable_names);
        }
        Ok(())
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    node: usize,
    life: u64,
}

impl SimFile {
    fn state(&self, call: Call) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.disk.state();
        state.call(call)?;
        if state.life != self.life {
            return Err(io::Error::other("open before the power was cut"));
        }
        Ok(state)
    }
}

fn copy(content: &[u8], buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let offset = offset as usize;
    let held = content
        .get(offset..offset + buffer.len())
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    buffer.copy_from_slice(held);
    Ok(())
}

impl DiskFile for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.state(Call::Read)?;
        copy(&state.nodes[self.node].cached, buffer, offset)
    }

    fn read_medium_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.state(Call::Read)?;
        // The kernel writes dirty pages out before it reads past its cache.
        let mut node = state.nodes[self.node].clone();
        for change in &node.changes {
            change.apply(&mut node.medium);
        }
        copy(&node.medium, buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.state(Call::Write)?;
        let node = &state.nodes[self.node];
        if node.block_device && offset as usize + bytes.len() > node.cached.len() {
            return Err(rustix::io::Errno::NOSPC.into());
        }
        let write = Change::Write {
            offset: offset as usize,
            bytes: bytes.to_vec(),
        };
        state.change(self.node, write)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.state(Call::Read)?.nodes[self.node].cached.len() as u64)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        let mut state = self.state(Call::Size)?;
        state.change(self.node, Change::Size(size as usize))
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = match self.state(Call::Sync) {
            Ok(state) => state,
            Err(error) => {
                // After a failed fsync the kernel takes the pages for clean: they stay in the cache and never arrive.
                let mut state = self.disk.state();
                if !state.off && state.life == self.life {
                    state.nodes[self.node].changes.clear();
                }
                return Err(error);
            }
        };
        state.during_write()?;
        let node = &mut state.nodes[self.node];
        for change in std::mem::take(&mut node.changes) {
            change.apply(&mut node.medium);
        }
        Ok(())
    }

    fn forget_cached(&self) -> io::Result<()> {
        // It is advice, and this kernel does not take it.
        self.state(Call::Read).map(drop)
    }

    fn identity(&self) -> io::Result<Identity> {
        let state = self.state(Call::Read)?;
        // No kernel has such numbers.
        let number = rustix::fs::makedev(0xf_fff0, self.node as u32);
        Ok(if state.nodes[self.node].block_device {
            Identity::BlockDevice { number }
        } else {
            Identity::File {
                device: number,
                inode: self.node as u64,
            }
        })
    }
}
