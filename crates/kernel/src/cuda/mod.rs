//! One NVIDIA GPU: a context, one stream, compiled kernels, cuBLASLt plans, scratch memory.
//!
//! Everything is loaded at run time (driver, NVRTC, cuBLASLt), so the same binary runs where there is no GPU. All work goes to
//! one stream in order, which is why scratch and uploaded tables can be reused from op to op without waiting.
#![allow(
    unsafe_code,
    reason = "the driver is called through raw pointers; every call is checked and wrapped here"
)]

mod blas;
mod buffer;
mod choices;
mod graph;
mod meter;
mod missing;
mod module;
pub mod nccl;
mod pieces;
mod pinned;
mod properties;
mod ring;
mod step_table;
mod table;
mod timer;
mod upload;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::{result, sys};

use crate::{Error, Result};

pub use blas::WORKSPACE_BYTES;
pub(crate) use blas::{Gemm, Operand};
pub(crate) use buffer::Buffer;
pub use graph::Graph;
pub use meter::footprint;
pub use missing::{Missing, missing};
pub use module::SOURCES;
pub(crate) use module::{Args, Grid, sources};
pub use module::{Compiled, Source, architecture, compile, compile_verbose, load_nvrtc};
pub(crate) use pieces::Pieces;
pub use pinned::Pinned;
pub use properties::DeviceProperties;
pub use ring::Ring;
pub use step_table::{Placed, Slot, StepTable};
pub(crate) use table::Table;
pub use timer::Timer;
pub use upload::table_bytes;

/// Handle to an opened GPU; cheap to copy, valid until the process ends. One thread at a time may call ops on it.
#[derive(Clone, Copy)]
pub struct Cuda(&'static Context);

pub(crate) struct Context {
    ordinal: usize,
    name: String,
    /// 10 · major + minor.
    compute: u32,
    n_multiprocessors: u32,
    shared_bytes_per_block: usize,
    total_bytes: usize,
    /// Whether the driver limits how long a kernel runs, as it does for a GPU that draws a desktop.
    has_display: bool,
    context: sys::CUcontext,
    stream: sys::CUstream,
    copies: ring::Copies,
    meter: meter::Meter,
    state: Mutex<State>,
}

/// What grows while ops run.
struct State {
    modules: module::Modules,
    uploads: upload::Uploads,
    blas: Option<blas::Blas>,
    scratch: Option<Buffer>,
    /// Milliseconds and calls by kernel, while profiling.
    profile: Option<BTreeMap<String, (f64, usize)>>,
}

// SAFETY: the handles are opaque names that the driver lets any thread use once the context is current there (`bind`); what
// changes is behind the mutex. Scratch and tables are shared by all ops in the order of the stream, so ops of one GPU must be
// called by one thread at a time: training, evaluation and the engine each hold their model alone.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// The first generation with bf16 on its matrix units.
const OLDEST_MAJOR: i32 = 8;

static OPENED: Mutex<BTreeMap<usize, Cuda>> = Mutex::new(BTreeMap::new());
static KERNEL_CACHE: OnceLock<PathBuf> = OnceLock::new();

thread_local! {
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Where compiled kernels are kept between runs; the first call of a process counts. Without one they are compiled each time.
pub fn set_kernel_cache(dir: PathBuf) {
    let _ = KERNEL_CACHE.set(dir);
}

pub(crate) fn kernel_cache() -> Option<&'static PathBuf> {
    KERNEL_CACHE.get()
}

/// Number of GPUs that the driver shows; 0 without a driver.
pub fn device_count() -> usize {
    // SAFETY: probes for the library by name; nothing else runs.
    if !unsafe { sys::is_culib_present() } || result::init().is_err() {
        return 0;
    }
    result::device::get_count().map_or(0, |n| n.max(0) as usize)
}

impl Cuda {
    /// Opens GPU `ordinal`, once a process.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver or without that GPU; [`Error::Cuda`] if it cannot be opened.
    pub fn open(ordinal: usize) -> Result<Cuda> {
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cuda) = opened.get(&ordinal) {
            return Ok(*cuda);
        }
        if ordinal >= device_count() {
            return Err(Error::NoDevice {
                asked: format!("cuda:{ordinal}"),
            });
        }
        let cuda = Cuda(Box::leak(Box::new(Context::new(ordinal)?)));
        opened.insert(ordinal, cuda);
        Ok(cuda)
    }

    /// Its number among the GPUs that the driver shows.
    pub fn ordinal(self) -> usize {
        self.0.ordinal
    }

    /// Product name, as the driver says it.
    pub fn name(self) -> &'static str {
        &self.0.name
    }

    /// Compute capability as 10 · major + minor: 89 is 8.9.
    pub fn compute(self) -> u32 {
        self.0.compute
    }

    /// Multiprocessors: what grids are sized by.
    pub fn n_multiprocessors(self) -> u32 {
        self.0.n_multiprocessors
    }

    /// Most dynamic shared memory a block may ask for.
    pub fn shared_bytes_per_block(self) -> usize {
        self.0.shared_bytes_per_block
    }

    /// All of its memory.
    pub fn total_bytes(self) -> usize {
        self.0.total_bytes
    }

    /// Free memory now, other programs counted.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the GPU is gone.
    pub fn free_bytes(self) -> Result<usize> {
        self.bind()?;
        let (free, _) = check("memory info", result::mem_get_info())?;
        Ok(free)
    }

    /// What sizes scratch and plans on this GPU.
    pub fn properties(self) -> DeviceProperties {
        let limit = self
            .0
            .meter
            .limit()
            .map(DeviceProperties::memory_for_buffers);
        DeviceProperties {
            compute: self.0.compute,
            n_multiprocessors: self.0.n_multiprocessors,
            memory_bytes: limit.map_or(self.0.total_bytes, |l| l.min(self.0.total_bytes)),
        }
    }

    /// From now on this GPU behaves as one with `bytes` of memory: plans fill no more, and what asks for more fails.
    pub fn limit_memory(self, bytes: usize) {
        self.0
            .meter
            .set_limit(DeviceProperties::buffers_of_memory(bytes));
    }

    /// Bytes that buffers may yet take: what is free now without what kernels, and a desktop on the same GPU, are going to take, or
    /// what a limit leaves.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the GPU is gone.
    pub fn available_bytes(self) -> Result<usize> {
        let others = match self.0.has_display {
            true => properties::DISPLAY_BYTES,
            false => 0,
        };
        let free = self.free_bytes()?;
        let free = free.saturating_sub(properties::KERNEL_BYTES + others);
        let left = self.0.meter.left();
        Ok(left.map_or(free, |left| left.min(free)))
    }

    /// Bytes that tensors, scratch and tables take now, and the most since [`Cuda::reset_peak`].
    pub fn allocated_bytes(self) -> (usize, usize) {
        self.0.meter.levels()
    }

    /// From now on the most that [`Cuda::allocated_bytes`] tells counts from what is taken now.
    pub fn reset_peak(self) {
        self.0.meter.reset_peak();
    }

    /// Takes scratch of the size that a plan expects before the first op, so that what does not fit fails at the start.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::OverLimit`].
    pub fn reserve_scratch(self, bytes: usize) -> Result<()> {
        self.scratch(bytes).map(|_| ())
    }

    /// From now on waits after every kernel and adds up its time; for `bench`.
    pub fn start_profile(self) {
        self.state().profile = Some(BTreeMap::new());
    }

    /// Whether kernels are being timed one by one: recorded ones would not be.
    pub fn is_profiled(self) -> bool {
        self.state().profile.is_some()
    }

    /// Ends profiling: (kernel or product, milliseconds, calls), longest first.
    pub fn take_profile(self) -> Vec<(String, f64, usize)> {
        let profile = self.state().profile.take().unwrap_or_default();
        let mut lines: Vec<_> = profile
            .into_iter()
            .map(|(name, (ms, calls))| (name, ms, calls))
            .collect();
        lines.sort_by(|a, b| b.1.total_cmp(&a.1));
        lines
    }

    /// Runs `queue`; while profiling, waits for it and books its time under `name`.
    fn timed(
        self,
        name: impl FnOnce() -> String,
        queue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if self.state().profile.is_none() {
            return queue();
        }
        let timer = Timer::start(self)?;
        queue()?;
        let ms = f64::from(timer.stop()?);
        if let Some(profile) = &mut self.state().profile {
            let entry = profile.entry(name()).or_insert((0.0, 0));
            entry.0 += ms;
            entry.1 += 1;
        }
        Ok(())
    }

    /// Waits until all work is done.
    ///
    /// # Errors
    /// [`Error::Cuda`] if any of it failed.
    pub fn synchronize(self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as the process.
        check("synchronize", unsafe {
            result::stream::synchronize(self.0.stream)
        })
    }

    /// Makes the context current on this thread.
    pub(crate) fn bind(self) -> Result<()> {
        if CURRENT.get() == Some(self.0.ordinal) {
            return Ok(());
        }
        // SAFETY: the context is retained for the life of the process.
        check("bind context", unsafe {
            result::ctx::set_current(self.0.context)
        })?;
        CURRENT.set(Some(self.0.ordinal));
        Ok(())
    }

    pub(crate) fn stream(self) -> sys::CUstream {
        self.0.stream
    }

    fn copies(self) -> &'static ring::Copies {
        &self.0.copies
    }

    /// Waits until nothing is copied from or to pinned memory any more.
    pub(crate) fn settle_copies(self) -> Result<()> {
        self.bind()?;
        for stream in [self.0.copies.up, self.0.copies.down] {
            // SAFETY: the stream lives as long as the process.
            check("synchronize", unsafe {
                result::stream::synchronize(stream)
            })?;
        }
        Ok(())
    }

    fn state(self) -> MutexGuard<'static, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a kernel of `source`.
    pub(crate) fn launch(
        self,
        source: &'static Source,
        kernel: &'static str,
        grid: Grid,
        args: Args,
    ) -> Result<()> {
        self.launch_as(source, kernel, grid, args, module::Order::Waits)
    }

    /// As [`Cuda::launch`], for a kernel that waits by itself for the one before (`await_predecessor`) and may start before that is done.
    pub(crate) fn launch_early(
        self,
        source: &'static Source,
        kernel: &'static str,
        grid: Grid,
        args: Args,
    ) -> Result<()> {
        let order = match self.compute() {
            ..90 => module::Order::Waits,
            _ => module::Order::StartsEarly,
        };
        self.launch_as(source, kernel, grid, args, order)
    }

    fn launch_as(
        self,
        source: &'static Source,
        kernel: &'static str,
        grid: Grid,
        args: Args,
        order: module::Order,
    ) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        self.bind()?;
        let function = self
            .state()
            .modules
            .function(self, source, kernel, grid.shared_bytes)?;
        self.timed(
            || kernel.to_owned(),
            || module::launch(self.0.stream, kernel, function, grid, args, order),
        )
    }

    /// Device copy of a small table (tokens, boundaries), valid for the ops queued until thirty other tables came.
    pub(crate) fn upload(self, table: &[u32]) -> Result<u64> {
        self.bind()?;
        let mut state = self.state();
        let State { uploads, .. } = &mut *state;
        uploads.get(self, table)
    }

    /// Scratch of at least `bytes`, contents unspecified, valid for the ops queued by the caller until the next call of any op.
    pub(crate) fn scratch(self, bytes: usize) -> Result<u64> {
        self.bind()?;
        let old = {
            let mut state = self.state();
            match &state.scratch {
                Some(buffer) if buffer.bytes() >= bytes => return Ok(buffer.pointer()),
                _ => state.scratch.take(),
            }
        };
        drop(old);
        let buffer = Buffer::new(self, bytes)?;
        let pointer = buffer.pointer();
        self.state().scratch = Some(buffer);
        Ok(pointer)
    }

    /// Copies an op's result in scratch to the host, after all work before it.
    pub(crate) fn read(self, pointer: u64, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the op computed `pointer` inside its scratch, and the host slice outlives the wait below.
        check("copy from the GPU", unsafe {
            result::memcpy_dtoh_async(bytes, pointer, self.0.stream)
        })?;
        self.synchronize()
    }

    /// d = alpha · a b (+ base), see [`Gemm`].
    pub(crate) fn gemm(self, gemm: &Gemm) -> Result<()> {
        self.bind()?;
        if self.state().blas.is_none() {
            let blas = blas::Blas::new(self)?;
            self.state().blas = Some(blas);
        }
        let name = || {
            let adds = if gemm.base.is_some() { " added" } else { "" };
            format!("product [{},{}] over {}{adds}", gemm.m, gemm.n, gemm.k)
        };
        self.timed(name, || match &mut self.state().blas {
            Some(blas) => blas.run(self, gemm),
            None => Ok(()),
        })
    }

    fn meter(self) -> &'static meter::Meter {
        &self.0.meter
    }
}

impl Context {
    fn new(ordinal: usize) -> Result<Context> {
        use sys::CUdevice_attribute_enum as Attribute;
        let device = check("open", result::device::get(ordinal as i32))?;
        // SAFETY: `device` came from the driver.
        let attribute = |which| {
            check("query", unsafe {
                result::device::get_attribute(device, which)
            })
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < OLDEST_MAJOR {
            return Err(Error::TooOld {
                name: check("query", result::device::get_name(device))?,
                compute_major: major,
                compute_minor: minor,
            });
        }
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let run_limit = attribute(Attribute::CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT)?;
        // SAFETY: as above; the primary context is kept until the process ends.
        let (total_bytes, context) = unsafe {
            (
                check("query", result::device::total_mem(device))?,
                check("open context", result::primary_ctx::retain(device))?,
            )
        };
        // SAFETY: retained just now.
        check("bind context", unsafe { result::ctx::set_current(context) })?;
        CURRENT.set(Some(ordinal));
        let stream = check(
            "create stream",
            result::stream::create(result::stream::StreamKind::NonBlocking),
        )?;
        Ok(Context {
            ordinal,
            name: check("query", result::device::get_name(device))?,
            compute: (10 * major + minor) as u32,
            n_multiprocessors: multiprocessors as u32,
            shared_bytes_per_block: shared as usize,
            total_bytes,
            has_display: run_limit != 0,
            context,
            stream,
            copies: ring::Copies::new()?,
            meter: meter::Meter::default(),
            state: Mutex::new(State {
                modules: module::Modules::default(),
                uploads: upload::Uploads::default(),
                blas: None,
                scratch: None,
                profile: None,
            }),
        })
    }
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{}", self.0.ordinal)
    }
}

impl PartialEq for Cuda {
    fn eq(&self, other: &Cuda) -> bool {
        self.0.ordinal == other.0.ordinal
    }
}

impl Eq for Cuda {}

/// Turns a driver error into ours.
fn check<T>(call: &'static str, outcome: std::result::Result<T, result::DriverError>) -> Result<T> {
    outcome.map_err(|error| {
        let text = |name: std::result::Result<&std::ffi::CStr, _>| {
            name.map_or_else(
                |_| format!("{:?}", error.0),
                |s| s.to_string_lossy().into_owned(),
            )
        };
        Error::Cuda {
            call,
            code: text(error.error_name()),
            what: text(error.error_string()),
        }
    })
}
