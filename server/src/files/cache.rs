//! Which images of a bucket are on this node's disk: what they take, and which goes first when there is no room.
//!
//! Only the account: it touches no file. Bytes are counted from the moment that a fetch may begin, so that the bound holds at
//! every instant.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use fwpush_keys::id::FileId;

/// The account.
#[derive(Debug)]
pub(super) struct Cache {
    most: u64,
    books: Mutex<Books>,
}

#[derive(Debug, Default)]
struct Books {
    held: HashMap<FileId, Held>,
    /// Of `held` and of what is reserved.
    bytes: u64,
    /// Rises with each use.
    turn: u64,
}

#[derive(Debug)]
struct Held {
    bytes: u64,
    used: u64,
    trust: Trust,
}

/// What is known of a file on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// It was hashed since this process began, and nothing was found wrong with it.
    Verified,
    /// It was there at the start, or something was wrong with it.
    Doubted,
}

/// Room for a file on its way; dropped, it is free again.
#[derive(Debug)]
pub(super) struct Room<'a> {
    cache: &'a Cache,
    bytes: u64,
}

/// Why there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// Not even in an empty cache.
    Never,
    /// What is there is being downloaded.
    Now,
}

impl Cache {
    /// Room for `most` bytes.
    pub(super) fn new(most: u64) -> Self {
        Self {
            most,
            books: Mutex::default(),
        }
    }

    pub(super) fn most(&self) -> u64 {
        self.most
    }

    /// Bytes held and reserved.
    pub(super) fn bytes(&self) -> u64 {
        self.books().bytes
    }

    /// Makes the file the last to go, and says what is known of it. `None`: it is not here.
    pub(super) fn touch(&self, id: &FileId) -> Option<Trust> {
        let mut books = self.books();
        books.turn += 1;
        let turn = books.turn;
        let held = books.held.get_mut(id)?;
        held.used = turn;
        Some(held.trust)
    }

    /// Every file here.
    pub(super) fn list(&self) -> Vec<FileId> {
        self.books().held.keys().copied().collect()
    }

    /// Whether [`Self::reserve`] would find room now.
    pub(super) fn has_room(
        &self,
        bytes: u64,
        in_use: impl Fn(&FileId) -> bool,
    ) -> Result<(), NoRoom> {
        self.books().room_for(bytes, self.most, in_use).map(drop)
    }

    /// Makes room for a file of `bytes`, and gives what has to be removed for it with its bytes, which count no more: the longest
    /// unused first, and nothing that is in use. What cannot be removed is to be [put back](Self::put_back).
    pub(super) fn reserve(
        &self,
        bytes: u64,
        in_use: impl Fn(&FileId) -> bool,
    ) -> Result<(Room<'_>, Vec<(FileId, u64)>), NoRoom> {
        let mut books = self.books();
        let victims = books
            .room_for(bytes, self.most, in_use)?
            .into_iter()
            .filter_map(|id| books.forget(&id).map(|bytes| (id, bytes)));
        let victims = victims.collect();
        books.bytes += bytes;
        Ok((Room { cache: self, bytes }, victims))
    }

    /// Enters what was found at the start; gives what has to be removed because the bound is lower now.
    pub(super) fn enter_found(&self, id: FileId, bytes: u64) -> Vec<FileId> {
        let mut books = self.books();
        books.enter(id, bytes, Trust::Doubted);
        let excess = books.bytes.saturating_sub(self.most);
        let victims = books.victims(excess, |_| false).unwrap_or_default();
        for id in &victims {
            books.forget(id);
        }
        victims
    }

    /// Notes what was found out about a file here.
    pub(super) fn set_trust(&self, id: &FileId, trust: Trust) {
        if let Some(held) = self.books().held.get_mut(id) {
            held.trust = trust;
        }
    }

    /// The file is not here any more; gives the bytes that it took. Unknown: `None`.
    pub(super) fn forget(&self, id: &FileId) -> Option<u64> {
        self.books().forget(id)
    }

    /// The file was to be removed and could not be, or not wholly. Entered anew since: changes nothing.
    pub(super) fn put_back(&self, id: FileId, bytes: u64) {
        let mut books = self.books();
        if !books.held.contains_key(&id) {
            books.enter(id, bytes, Trust::Doubted);
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    fn enter(&mut self, id: FileId, bytes: u64, trust: Trust) {
        self.forget(&id);
        self.turn += 1;
        self.bytes += bytes;
        let used = self.turn;
        self.held.insert(id, Held { bytes, used, trust });
    }

    fn forget(&mut self, id: &FileId) -> Option<u64> {
        let held = self.held.remove(id)?;
        self.bytes -= held.bytes;
        Some(held.bytes)
    }

    /// What is to go so that `bytes` more are within `most`.
    fn room_for(
        &self,
        bytes: u64,
        most: u64,
        in_use: impl Fn(&FileId) -> bool,
    ) -> Result<Vec<FileId>, NoRoom> {
        if bytes > most {
            return Err(NoRoom::Never);
        }
        let excess = (self.bytes + bytes).saturating_sub(most);
        self.victims(excess, in_use).ok_or(NoRoom::Now)
    }

    /// What is to go so that `excess` bytes become free. `None`: what is not in use is less than that.
    fn victims(&self, excess: u64, in_use: impl Fn(&FileId) -> bool) -> Option<Vec<FileId>> {
        let mut victims = Vec::new();
        if excess == 0 {
            return Some(victims);
        }
        let mut held: Vec<_> = self.held.iter().collect();
        held.sort_unstable_by_key(|(_, held)| held.used);
        let mut freed = 0;
        for (id, held) in held {
            if freed >= excess {
                break;
            }
            if !in_use(id) {
                freed += held.bytes;
                victims.push(*id);
            }
        }
        (freed >= excess).then_some(victims)
    }
}

impl Room<'_> {
    /// The file is here now, and was verified.
    pub(super) fn fill(mut self, id: FileId) {
        let cache = self.cache;
        let mut books = cache.books();
        // Until now it was reserved.
        let bytes = std::mem::take(&mut self.bytes);
        books.bytes -= bytes;
        books.enter(id, bytes, Trust::Verified);
        drop(books);
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.cache.books().bytes -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(name: u8) -> FileId {
        FileId::of(&[name])
    }

    fn bring(cache: &Cache, name: u8, bytes: u64) -> Result<Vec<FileId>, NoRoom> {
        let (room, gone) = cache.reserve(bytes, |_| false)?;
        room.fill(id(name));
        Ok(gone.into_iter().map(|(id, _)| id).collect())
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let cache = Cache::new(100);
        for name in 1..=3 {
            assert_eq!(bring(&cache, name, 30), Ok(vec![]));
        }
        assert_eq!(cache.touch(&id(1)), Some(Trust::Verified));
        assert_eq!(bring(&cache, 4, 60), Ok(vec![id(2), id(3)]));
        assert_eq!(cache.bytes(), 90);
        assert_eq!(cache.touch(&id(2)), None);
    }

    #[test]
    fn what_is_in_use_stays_and_then_there_is_no_room() {
        let cache = Cache::new(100);
        bring(&cache, 1, 60).unwrap();
        bring(&cache, 2, 40).unwrap();
        let in_use = |file: &FileId| *file == id(1);
        assert_eq!(cache.reserve(50, in_use).unwrap_err(), NoRoom::Now);
        assert_eq!(cache.reserve(101, in_use).unwrap_err(), NoRoom::Never);
        assert_eq!(cache.bytes(), 100, "nothing was given up for nothing");
        let (_room, gone) = cache.reserve(40, in_use).unwrap();
        assert_eq!(gone, [(id(2), 40)]);
    }

    #[test]
    fn room_that_was_not_used_is_free_again_and_what_comes_twice_counts_once() {
        let cache = Cache::new(100);
        drop(cache.reserve(70, |_| false).unwrap());
        assert_eq!(cache.bytes(), 0);
        bring(&cache, 1, 40).unwrap();
        bring(&cache, 1, 50).unwrap();
        assert_eq!(cache.bytes(), 50);
        assert_eq!(cache.enter_found(id(2), 60), [id(1)], "a lower bound");
        assert_eq!(cache.touch(&id(2)), Some(Trust::Doubted));
        cache.set_trust(&id(2), Trust::Verified);
        assert_eq!(cache.touch(&id(2)), Some(Trust::Verified));
    }

    #[test]
    fn what_could_not_be_removed_counts_and_is_not_trusted() {
        let cache = Cache::new(100);
        bring(&cache, 1, 60).unwrap();
        let (room, gone) = cache.reserve(50, |_| false).unwrap();
        for (id, bytes) in gone {
            cache.put_back(id, bytes);
        }
        drop(room);
        assert_eq!(cache.bytes(), 60);
        assert_eq!(cache.touch(&id(1)), Some(Trust::Doubted));
        assert_eq!(cache.forget(&id(1)), Some(60));
        bring(&cache, 1, 30).unwrap();
        cache.put_back(id(1), 60);
        assert_eq!(cache.bytes(), 30, "it was fetched anew since");
    }

    proptest! {
        #[test]
        fn the_bound_holds_whatever_comes(
            steps in proptest::collection::vec((0u8..20, 1u64..60, 0u8..20, any::<bool>()), 1..200),
        ) {
            let cache = Cache::new(100);
            for (name, bytes, used, kept) in steps {
                if let Ok((room, _)) = cache.reserve(bytes, |file| *file == id(used)) {
                    prop_assert!(cache.bytes() <= 100);
                    if kept { room.fill(id(name)) }
                }
                let held: u64 = cache.books().held.values().map(|held| held.bytes).sum();
                prop_assert_eq!(cache.bytes(), held);
                prop_assert!(held <= 100);
            }
        }
    }
}
