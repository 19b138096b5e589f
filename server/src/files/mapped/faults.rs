//! Reads of a mapping that its file cannot serve: the page is replaced by zeros, the mapping noted as torn, and the read goes on.
//!
//! Display servers do the same with buffers that clients share and may truncate (libwayland, `wayland-shm.c`, `sigbus_handler`;
//! X.Org, `os/busfault.c`). Zeros are safe to send: a device verifies each group before it writes it.

use std::{
    ffi::{c_int, c_void},
    io, mem, ptr,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering},
    },
};

/// A mapping whose faults are survived, until this is dropped. That must be before the mapping goes.
#[derive(Debug)]
pub(super) struct Watch {
    place: &'static Place,
}

impl Watch {
    pub(super) fn new(map: &[u8]) -> io::Result<Self> {
        install()?;
        let place = Place::take();
        place.torn.store(false, Ordering::Relaxed);
        let start = map.as_ptr().addr();
        place.start.store(start, Ordering::Release);
        place.end.store(start + map.len(), Ordering::Release);
        Ok(Self { place })
    }

    pub(super) fn is_torn(&self) -> bool {
        self.place.torn.load(Ordering::Relaxed)
    }

    pub(super) fn tear(&self) {
        self.place.torn.store(true, Ordering::Relaxed);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.place.end.store(0, Ordering::Release);
        self.place.start.store(0, Ordering::Release);
        self.place.taken.store(false, Ordering::Release);
    }
}

/// A place in the list of watched mappings, which the handler walks: places are added and used again, never freed, so their
/// number is that of the most mappings at one time.
#[derive(Debug)]
struct Place {
    taken: AtomicBool,
    /// Addresses; an end of 0 covers nothing.
    start: AtomicUsize,
    end: AtomicUsize,
    torn: AtomicBool,
    next: AtomicPtr<Place>,
}

static PLACES: AtomicPtr<Place> = AtomicPtr::new(ptr::null_mut());
static PAGE_BYTES: AtomicUsize = AtomicUsize::new(0);
/// What was to be done on SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

impl Place {
    /// A place that nobody else has.
    fn take() -> &'static Self {
        let free = |place: &&Self| {
            let taken = &place.taken;
            taken
                .compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        if let Some(place) = Self::all().find(free) {
            return place;
        }
        let place: &'static mut Self = Box::leak(Box::new(Self {
            taken: AtomicBool::new(true),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            torn: AtomicBool::new(false),
            next: AtomicPtr::new(ptr::null_mut()),
        }));
        let place: &'static Self = place;
        let mut first = PLACES.load(Ordering::Acquire);
        loop {
            place.next.store(first, Ordering::Relaxed);
            let added = PLACES.compare_exchange_weak(
                first,
                ptr::from_ref(place).cast_mut(),
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match added {
                Ok(_) => return place,
                Err(other) => first = other,
            }
        }
    }

    fn all() -> impl Iterator<Item = &'static Self> {
        // SAFETY: the list holds only leaked places, which live for ever and are only shared.
        let at = |place: *mut Self| unsafe { place.as_ref() };
        let first = at(PLACES.load(Ordering::Acquire));
        std::iter::successors(first, move |place| at(place.next.load(Ordering::Relaxed)))
    }

    fn covers(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        let end = self.end.load(Ordering::Acquire);
        // A place that changed hands in between covers neither.
        (start..end).contains(&address) && self.start.load(Ordering::Acquire) == start
    }
}

/// Has SIGBUS handled, once for the process.
fn install() -> io::Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    PAGE_BYTES.store(rustix::param::page_size(), Ordering::Relaxed);
    // SAFETY: an action of zeros is a valid one (SIG_DFL, no flags); both calls get valid pointers; and the handler does nothing
    // but what signal-safety(7) allows, and mmap, which is one system call.
    unsafe {
        let mut before: libc::sigaction = mem::zeroed();
        if libc::sigaction(libc::SIGBUS, ptr::null(), &mut before) != 0 {
            return Err(io::Error::last_os_error());
        }
        // Before the handler may be called.
        BEFORE.get_or_init(|| before);
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        if libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    *installed = true;
    Ok(())
}

/// Runs in the thread that read, in the middle of whatever that did: it may take no lock and no memory.
extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a valid siginfo, whose address counts where the code says that a fault was the cause.
    let fault = unsafe { ((*info).si_code > 0).then(|| (*info).si_addr().addr()) };
    if !fault.is_some_and(mend) {
        pass_on(signal, info, context);
    }
}

/// Puts a page of zeros in the place of the one at `address`. False: it is not of a watched mapping.
fn mend(address: usize) -> bool {
    let Some(place) = Place::all().find(|place| place.covers(address)) else {
        return false;
    };
    let bytes = PAGE_BYTES.load(Ordering::Relaxed);
    let page = address & !(bytes - 1);
    // SAFETY: the page is of a mapping that the faulting thread is just reading, so it stays mapped, and nothing else is there.
    // errno belongs to what the thread was doing.
    unsafe {
        let errno = libc::__errno_location();
        let kept = *errno;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let zeros = libc::mmap(
            ptr::with_exposed_provenance_mut(page),
            bytes,
            libc::PROT_READ,
            flags,
            -1,
            0,
        );
        *errno = kept;
        if zeros == libc::MAP_FAILED {
            return false;
        }
    }
    place.torn.store(true, Ordering::Relaxed);
    true
}

/// Somebody else's fault: what was to be done before is done.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    type Plain = extern "C" fn(c_int);
    type WithInfo = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
    let before = BEFORE.get().map_or((libc::SIG_DFL, 0), |before| {
        (before.sa_sigaction, before.sa_flags)
    });
    match before {
        // Blocked until the handler returns, and then the end.
        // SAFETY: both calls are allowed in a handler.
        (libc::SIG_DFL | libc::SIG_IGN, _) => unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        },
        // SAFETY: sigaction(2) gave this address as that of a handler of the kind that the flags say.
        (handler, flags) => unsafe {
            if flags & libc::SA_SIGINFO != 0 {
                mem::transmute::<usize, WithInfo>(handler)(signal, info, context);
            } else {
                mem::transmute::<usize, Plain>(handler)(signal);
            }
        },
    }
}
