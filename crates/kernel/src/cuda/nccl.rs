//! Sums and copies between the GPUs of several processes, through NCCL.
//!
//! The library is opened by its own name, `libnccl.so.2`: cudarc looks for names that only development packages have. Every call is
//! non-blocking and waited for by asking, so that a process whose neighbour died gives up instead of hanging inside the driver.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUresult};

use super::{Cuda, check};
use crate::{DType, Error, Result, Tensor};

/// Names under which systems keep the library, the one that runs first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// Bytes of [`Id`].
const ID_BYTES: usize = 128;
/// Asked without a pause for so long, then with [`PAUSE`]: a sum between GPUs of one host takes about a millisecond.
const EAGER: Duration = Duration::from_millis(2);
const PAUSE: Duration = Duration::from_micros(100);

/// What several processes leave to NCCL of each GPU: the buffers of its rings' channels and its kernels' code. A round figure with room,
/// since it depends on NCCL's version and on how the GPUs are linked.
pub const RESERVED_BYTES: usize = 1 << 30;

/// What the first process makes and all others need in order to meet it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Id(pub [u8; ID_BYTES]);

impl Id {
    /// A new one, for one communicator.
    ///
    /// # Errors
    /// [`Error::NoNccl`] without the library, [`Error::Nccl`] without a network interface that NCCL can use.
    pub fn new() -> Result<Id> {
        let library = Library::open()?;
        let mut id = MaybeUninit::<Id>::uninit();
        // SAFETY: the call fills all bytes of what it points at, if it succeeds.
        let status = unsafe { (library.get_unique_id)(id.as_mut_ptr()) };
        library.check("ncclGetUniqueId", status, std::ptr::null_mut())?;
        // SAFETY: filled.
        Ok(unsafe { id.assume_init() })
    }

    /// From the bytes that another process sent; None unless they are as many as an id has.
    pub fn from_bytes(bytes: &[u8]) -> Option<Id> {
        bytes.try_into().ok().map(Id)
    }
}

/// One GPU's place among those of a run. One thread at a time may use it.
#[derive(Debug)]
pub struct Communicator {
    library: &'static Library,
    comm: *mut c_void,
    cuda: Cuda,
}

// SAFETY: NCCL lets any thread call with a communicator, one at a time; `Communicator` is held by one run, whose thread makes all calls.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

/// Whether waiting still makes sense; asked again and again.
pub type GoOn<'a> = &'a dyn Fn() -> bool;

impl Communicator {
    /// Meets the other `n_ranks` − 1 processes that were given `id`; each has its own rank, 0 to `n_ranks` − 1, and its own GPU.
    ///
    /// # Errors
    /// [`Error::NoNccl`]; [`Error::Nccl`] with what NCCL says, or if `go_on` said no before all were there.
    pub fn join(
        cuda: Cuda,
        id: Id,
        rank: usize,
        n_ranks: usize,
        go_on: GoOn,
    ) -> Result<Communicator> {
        const CALL: &str = "ncclCommInitRankConfig";
        let library = Library::open()?;
        cuda.bind()?;
        let mut config = Config::non_blocking();
        let mut comm = std::ptr::null_mut();
        // SAFETY: the configuration says its own size and version; NCCL reads it during the call.
        let status = unsafe {
            (library.comm_init_rank_config)(
                &mut comm,
                n_ranks as c_int,
                id,
                rank as c_int,
                &mut config,
            )
        };
        library.check(CALL, status, comm)?;
        let communicator = Communicator {
            library,
            comm,
            cuda,
        };
        communicator.settle(CALL, go_on)?;
        Ok(communicator)
    }

    /// Sums each tensor (f32) over all ranks into that of its `root`, which alone may read its tensor afterwards; done on return.
    /// All ranks must call with as many tensors of the same sizes and roots.
    ///
    /// # Errors
    /// [`Error::Nccl`] if a transfer failed or `go_on` said no.
    pub fn reduce(&self, tensors: &mut [Tensor], roots: &[usize], go_on: GoOn) -> Result<()> {
        assert_eq!(tensors.len(), roots.len(), "one root a tensor");
        let calls = tensors.iter().zip(roots).map(|(tensor, root)| {
            let pointer = tensor.device_pointer() as *mut c_void;
            let (count, dtype) = (tensor.numel(), data_type(tensor.dtype()));
            // SAFETY: the tensor owns `count` elements there, and `collective` returns after they are no longer used.
            move || unsafe {
                (self.library.reduce)(
                    pointer,
                    pointer,
                    count,
                    dtype,
                    SUM,
                    *root as c_int,
                    self.comm,
                    self.cuda.stream().cast(),
                )
            }
        });
        self.collective("ncclReduce", calls, go_on)
    }

    /// Copies each tensor from its `root` to all ranks; done on return. All ranks must call with as many tensors of the same sizes,
    /// types and roots.
    ///
    /// # Errors
    /// [`Error::Nccl`] if a transfer failed or `go_on` said no.
    pub fn broadcast(
        &self,
        tensors: &mut [&mut Tensor],
        roots: &[usize],
        go_on: GoOn,
    ) -> Result<()> {
        assert_eq!(tensors.len(), roots.len(), "one root a tensor");
        let calls = tensors.iter().zip(roots).map(|(tensor, root)| {
            let pointer = tensor.device_pointer() as *mut c_void;
            let (count, dtype) = (tensor.numel(), data_type(tensor.dtype()));
            // SAFETY: as in `reduce`.
            move || unsafe {
                (self.library.broadcast)(
                    pointer,
                    pointer,
                    count,
                    dtype,
                    *root as c_int,
                    self.comm,
                    self.cuda.stream().cast(),
                )
            }
        });
        self.collective("ncclBroadcast", calls, go_on)
    }

    /// Queues `calls` as one group, after the work that makes their tensors, and waits until all are done.
    fn collective<F: FnOnce() -> c_int>(
        &self,
        name: &'static str,
        calls: impl Iterator<Item = F>,
        go_on: GoOn,
    ) -> Result<()> {
        self.cuda.bind()?;
        // SAFETY: every start has its end below.
        let status = unsafe { (self.library.group_start)() };
        self.library.check("ncclGroupStart", status, self.comm)?;
        let mut queued = Ok(());
        for call in calls {
            queued = self.library.check(name, call(), self.comm);
            if queued.is_err() {
                break;
            }
        }
        // SAFETY: started above.
        let status = unsafe { (self.library.group_end)() };
        queued.and_then(|()| self.library.check(name, status, self.comm))?;
        self.settle(name, go_on)?;
        self.poll(name, go_on, || self.is_idle())
    }

    /// Waits until NCCL has done what it was asked to do on the host.
    fn settle(&self, call: &'static str, go_on: GoOn) -> Result<()> {
        self.poll(call, go_on, || {
            let mut state = SUCCESS;
            // SAFETY: the communicator lives as long as `self`.
            let status = unsafe { (self.library.comm_get_async_error)(self.comm, &mut state) };
            self.library
                .check("ncclCommGetAsyncError", status, self.comm)?;
            self.library.check(call, state, self.comm)?;
            Ok(state != IN_PROGRESS)
        })
    }

    /// Whether the GPU has nothing left to do; an error that NCCL met meanwhile.
    fn is_idle(&self) -> Result<bool> {
        // SAFETY: the stream lives as long as the process.
        match unsafe { sys::cuStreamQuery(self.cuda.stream()) } {
            CUresult::CUDA_ERROR_NOT_READY => {
                let mut state = SUCCESS;
                // SAFETY: as in `settle`.
                let status = unsafe { (self.library.comm_get_async_error)(self.comm, &mut state) };
                self.library
                    .check("ncclCommGetAsyncError", status, self.comm)?;
                self.library.check("a transfer", state, self.comm)?;
                Ok(false)
            }
            result => {
                check("wait for NCCL", result.result())?;
                Ok(true)
            }
        }
    }

    fn poll(
        &self,
        call: &'static str,
        go_on: GoOn,
        mut is_done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let started = Instant::now();
        while !is_done()? {
            if !go_on() {
                return Err(Error::Nccl {
                    call,
                    what: "given up: another rank failed, or did not come in time".to_owned(),
                });
            }
            match started.elapsed() < EAGER {
                true => std::hint::spin_loop(),
                false => std::thread::sleep(PAUSE),
            }
        }
        Ok(())
    }
}

impl Drop for Communicator {
    /// Takes back what is still under way rather than waiting for ranks that may be gone: nothing of a finished run is.
    fn drop(&mut self) {
        if self.cuda.bind().is_ok() {
            // SAFETY: made in `join`, given back once.
            let _ = unsafe { (self.library.comm_abort)(self.comm) };
        }
    }
}

// Values of nccl.h, the same since version 2.0 (IN_PROGRESS: 2.14).
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const SUM: c_int = 0;

fn data_type(dtype: DType) -> c_int {
    match dtype {
        DType::F32 => 7,
        DType::Bf16 => 9,
    }
}

/// `ncclConfig_t` as of version 2.18; later versions read the fields that this one has and take defaults for theirs.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    fn non_blocking() -> Config {
        /// Left to NCCL.
        const UNDEFINED: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21800,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

type Comm = *mut c_void;
type Stream = *mut c_void;

/// The calls that are used, found once a process.
#[derive(Debug)]
struct Library {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    comm_init_rank_config: unsafe extern "C" fn(*mut Comm, c_int, Id, c_int, *mut Config) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        c_int,
        Comm,
        Stream,
    ) -> c_int,
    broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Comm,
        Stream,
    ) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Comm) -> *const c_char,
}

impl Library {
    fn open() -> Result<&'static Library> {
        static OPENED: OnceLock<Option<Library>> = OnceLock::new();
        OPENED
            .get_or_init(|| NAMES.into_iter().find_map(Library::load))
            .as_ref()
            .ok_or(Error::NoNccl)
    }

    /// None if there is no such library, or one older than 2.14, which lacks a call.
    fn load(name: &str) -> Option<Library> {
        // SAFETY: NCCL's initialisers run, which is what any first use of it does.
        let library = unsafe { libloading::Library::new(name) }.ok()?;
        // Open as long as the process, as are the calls found in it.
        let library = Box::leak(Box::new(library));
        macro_rules! call {
            ($name:literal) => {
                // SAFETY: the field's type is the call's type in nccl.h.
                *unsafe { library.get($name) }.ok()?
            };
        }
        Some(Library {
            get_version: call!(b"ncclGetVersion\0"),
            get_unique_id: call!(b"ncclGetUniqueId\0"),
            comm_init_rank_config: call!(b"ncclCommInitRankConfig\0"),
            comm_get_async_error: call!(b"ncclCommGetAsyncError\0"),
            comm_abort: call!(b"ncclCommAbort\0"),
            group_start: call!(b"ncclGroupStart\0"),
            group_end: call!(b"ncclGroupEnd\0"),
            reduce: call!(b"ncclReduce\0"),
            broadcast: call!(b"ncclBroadcast\0"),
            get_error_string: call!(b"ncclGetErrorString\0"),
            get_last_error: call!(b"ncclGetLastError\0"),
        })
    }

    fn check(&self, call: &'static str, status: c_int, comm: Comm) -> Result<()> {
        if status == SUCCESS || status == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both calls return text of their own that stays; no communicator is as good as one here.
        let texts = unsafe { [(self.get_error_string)(status), (self.get_last_error)(comm)] };
        let texts: Vec<_> = texts
            .into_iter()
            .filter(|text| !text.is_null())
            // SAFETY: not null, and ended by a zero byte.
            .map(|text| unsafe { CStr::from_ptr(text) }.to_string_lossy())
            .filter(|text| !text.is_empty())
            .collect();
        Err(Error::Nccl {
            call,
            what: texts.join(": "),
        })
    }
}

/// Version of the library as `major.minor.patch`.
///
/// # Errors
/// [`Error::NoNccl`] without the library.
pub fn version() -> Result<String> {
    let library = Library::open()?;
    let mut version = 0;
    // SAFETY: the call writes one number.
    let status = unsafe { (library.get_version)(&mut version) };
    library.check("ncclGetVersion", status, std::ptr::null_mut())?;
    Ok(format!(
        "{}.{}.{}",
        version / 10000,
        version / 100 % 100,
        version % 100
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_has_the_layout_of_nccl_2_18() {
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!(std::mem::offset_of!(Config, blocking), 16);
        assert_eq!(std::mem::offset_of!(Config, net_name), 32);
        assert_eq!(std::mem::offset_of!(Config, split_share), 40);
    }

    #[test]
    fn an_id_has_its_own_number_of_bytes() {
        assert_eq!(Id::from_bytes(&[7; 128]), Some(Id([7; 128])));
        assert_eq!(Id::from_bytes(&[7; 127]), None);
    }
}
