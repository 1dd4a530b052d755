//! Kernels: compiled with NVRTC for the GPU at hand, kept on disk, launched by name.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use cudarc::driver::{result, sys};
use cudarc::nvrtc;

use super::{Cuda, check, kernel_cache};
use crate::{DType, Error, Result};

/// What every kernel file begins with.
pub(crate) const PRELUDE: &str = include_str!("prelude.cuh");

/// A `.cu` file beside its op.
#[derive(Debug)]
pub struct Source {
    /// Name of the file, without `.cu`.
    pub name: &'static str,
    /// What the file holds.
    pub text: &'static str,
}

/// A kernel file for each constant: the folder of an op that has one, then the name.
macro_rules! sources {
    ($($constant:ident $($folder:literal)? / $name:literal),* $(,)?) => {
        $( pub(crate) static $constant: Source = Source {
            name: $name,
            text: include_str!(concat!("../ops/", $($folder, "/",)? $name, ".cu")),
        }; )*

        /// Every kernel file, for whoever compiles them all.
        pub static SOURCES: &[&Source] = &[$( &$constant ),*];
    };
}
pub(crate) mod sources {
    use super::Source;
    sources! {
        ADAMW / "adamw",
        ATTENTION "attention" / "attention",
        CAUSAL_CONV1D / "causal_conv1d",
        COPY / "copy",
        DECODE_ATTENTION / "decode_attention",
        DECODE_DELTA_NET / "decode_delta_net",
        DECODE_PRODUCT / "decode_product",
        DELTA_GATE / "delta_gate",
        EMBEDDING / "embedding",
        GATED_DELTA_RULE "gated_delta_rule" / "gated_delta_rule",
        GATED_DELTA_RULE_BF16 "gated_delta_rule" / "gated_delta_rule_bf16",
        GATED_DELTA_STEP / "gated_delta_step",
        GATED_RMS_NORM / "gated_rms_norm",
        GRAD_NORM / "grad_norm",
        L2_NORM / "l2_norm",
        LINEAR_CROSS_ENTROPY "linear_cross_entropy" / "linear_cross_entropy",
        LOW_RANK "low_rank" / "low_rank",
        RMS_NORM / "rms_norm",
        ROPE / "rope",
        ROWS / "rows",
        SIGMOID_GATE / "sigmoid_gate",
        SPLIT / "split",
        SWIGLU / "swiglu",
        TOP_CANDIDATES / "top_candidates",
    }
}
pub use sources::SOURCES;

impl Source {
    /// Prelude and file, as the compiler gets them.
    pub fn full_text(&self) -> String {
        format!("{PRELUDE}\n#line 1 \"{}.cu\"\n{}", self.name, self.text)
    }
}

/// The compiler's name for compute capability 10 · major + minor.
pub fn architecture(compute: u32) -> String {
    // Capabilities from 9.0 on have instructions of their own behind the letter a.
    let letter = if compute >= 90 { "a" } else { "" };
    format!("sm_{compute}{letter}")
}

/// Options that every kernel is compiled with, for compute capability 10 · major + minor.
pub fn compile_options(compute: u32) -> Vec<String> {
    vec![
        format!("--gpu-architecture={}", architecture(compute)),
        "--std=c++17".to_owned(),
        "--fmad=true".to_owned(),
        "--extra-device-vectorization".to_owned(),
    ]
}

#[derive(Default)]
pub(super) struct Modules {
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<(&'static str, &'static str), (sys::CUfunction, usize)>,
}

impl Modules {
    /// The kernel, compiled and loaded on first use, allowed `shared_bytes` of dynamic shared memory.
    pub fn function(
        &mut self,
        cuda: Cuda,
        source: &'static Source,
        kernel: &'static str,
        shared_bytes: usize,
    ) -> Result<sys::CUfunction> {
        let key = (source.name, kernel);
        if let Some((function, allowed)) = self.functions.get(&key)
            && *allowed >= shared_bytes
        {
            return Ok(*function);
        }
        let module = match self.modules.get(source.name) {
            Some(module) => *module,
            None => {
                let module = load(cuda, source)?;
                self.modules.insert(source.name, module);
                module
            }
        };
        let name = CString::new(kernel).unwrap_or_default();
        // SAFETY: the module stays loaded until the process ends.
        let function = check(kernel, unsafe {
            result::module::get_function(module, name)
        })?;
        if shared_bytes > 48 << 10 {
            // SAFETY: the function is loaded.
            check(kernel, unsafe {
                result::function::set_function_attribute(
                    function,
                    sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes as i32,
                )
            })?;
        }
        self.functions
            .insert(key, (function, shared_bytes.max(48 << 10)));
        Ok(function)
    }
}

fn load(cuda: Cuda, source: &Source) -> Result<sys::CUmodule> {
    let cached = cache_path(cuda, source);
    if let Some(path) = &cached
        && let Ok(image) = std::fs::read(path)
        && let Ok(module) = load_image(&image)
    {
        return Ok(module);
    }
    let image = compile(source, cuda.compute())?;
    if let Some(path) = &cached {
        // A cache that cannot be written costs time at the next start, nothing else.
        let _ = files::write(path, &image);
    }
    load_image(&image)
}

fn load_image(image: &[u8]) -> Result<sys::CUmodule> {
    // SAFETY: the driver reads the image during the call and checks it.
    check("load kernels", unsafe {
        result::module::load_data(image.as_ptr().cast())
    })
}

fn cache_path(cuda: Cuda, source: &Source) -> Option<PathBuf> {
    let dir = kernel_cache()?;
    let mut hasher = DefaultHasher::new();
    source.full_text().hash(&mut hasher);
    compile_options(cuda.compute()).hash(&mut hasher);
    Some(dir.join(format!(
        "{}-sm{}-{:016x}.cubin",
        source.name,
        cuda.compute(),
        hasher.finish()
    )))
}

/// Takes NVRTC from a folder, before anything asks for it; the library path needs none then.
///
/// # Errors
/// [`Error::NoNvrtc`] where no file of the folder is the library.
pub fn load_nvrtc(dir: &Path) -> Result<()> {
    let files = std::fs::read_dir(dir).map_err(|_| Error::NoNvrtc)?;
    for path in files.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_nvrtc = name.starts_with("libnvrtc.") || name.starts_with("nvrtc64_");
        // SAFETY: NVRTC's initialisers run, which is what any first use of it does.
        if is_nvrtc && let Ok(library) = unsafe { libloading::Library::new(&path) } {
            // Kept open: whoever asks for the library by its name now gets this one.
            std::mem::forget(library);
            return Ok(());
        }
    }
    Err(Error::NoNvrtc)
}

/// Machine code, and what the compiler said.
#[derive(Debug)]
pub struct Compiled {
    /// The cubin.
    pub image: Vec<u8>,
    /// What the compiler remarked.
    pub log: String,
}

/// Machine code of a kernel file for a compute capability; needs NVRTC, no GPU.
///
/// # Errors
/// [`Error::NoNvrtc`] without the library; [`Error::Compile`] with the compiler's messages.
pub fn compile(source: &Source, compute: u32) -> Result<Vec<u8>> {
    Ok(compile_with(source, compute, &compile_options(compute))?.image)
}

/// As [`compile`], with a log that says what each kernel takes: registers, spills, shared memory.
///
/// # Errors
/// As [`compile`].
pub fn compile_verbose(source: &Source, compute: u32) -> Result<Compiled> {
    let mut options = compile_options(compute);
    options.push("--ptxas-options=-v".to_owned());
    compile_with(source, compute, &options)
}

fn compile_with(source: &Source, compute: u32, options: &[String]) -> Result<Compiled> {
    // SAFETY: probes for the library by name.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err(Error::NoNvrtc);
    }
    let failed = |log: String| Error::Compile {
        file: source.name,
        compute,
        log,
    };
    let text =
        CString::new(source.full_text()).map_err(|_| failed("a NUL in the file".to_owned()))?;
    let program =
        nvrtc::result::create_program(&text, None).map_err(|e| failed(format!("{e:?}")))?;
    // SAFETY: `program` is alive until it is destroyed at the end; sizes are asked for before buffers are filled.
    unsafe {
        let outcome = nvrtc::result::compile_program(program, options);
        let log = nvrtc::result::get_program_log(program)
            .map(|log| log.iter().map(|c| *c as u8).collect::<Vec<u8>>())
            .unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let log = log.trim_end_matches('\0').to_owned();
        let compiled = match outcome {
            Ok(()) => {
                let mut size = 0;
                let mut image = Vec::new();
                nvrtc::sys::nvrtcGetCUBINSize(program, &mut size)
                    .result()
                    .and_then(|()| {
                        image.resize(size, 0u8);
                        nvrtc::sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()
                    })
                    .map(|()| Compiled { image, log })
                    .map_err(|e| failed(format!("{e:?}")))
            }
            Err(error) => Err(failed(format!("{error:?}\n{log}"))),
        };
        let _ = nvrtc::result::destroy_program(program);
        compiled
    }
}

/// Blocks, threads and dynamic shared memory of a launch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub blocks: [u32; 3],
    pub threads: u32,
    pub shared_bytes: usize,
}

impl Grid {
    /// `blocks` blocks in a row, no dynamic shared memory.
    pub fn line(blocks: usize, threads: u32) -> Grid {
        Grid {
            blocks: [blocks as u32, 1, 1],
            threads,
            shared_bytes: 0,
        }
    }

    /// One thread for each of `n` things.
    pub fn each(n: usize, threads: u32) -> Grid {
        Grid::line(n.div_ceil(threads as usize), threads)
    }
}

/// Arguments of a kernel, in its order. Tensors, which `tensor.rs` adds, go as `View` (pointer and dtype) or as a plain pointer.
#[derive(Debug, Default)]
pub(crate) struct Args {
    /// 16 bytes each, the most that one argument takes.
    slots: Vec<[u64; 2]>,
}

impl Args {
    pub fn new() -> Args {
        Args::default()
    }

    /// `View` of f32 or bf16 memory; null where the pointer is 0.
    pub fn view_at(self, pointer: u64, dtype: DType) -> Args {
        self.slot([pointer, u64::from(dtype == DType::Bf16)])
    }

    /// `T*`
    pub fn pointer(self, pointer: u64) -> Args {
        self.slot([pointer, 0])
    }

    /// `unsigned`
    pub fn u32(self, value: usize) -> Args {
        self.slot([value as u64 & 0xffff_ffff, 0])
    }

    /// `unsigned long long`
    pub fn u64(self, value: u64) -> Args {
        self.slot([value, 0])
    }

    pub fn f32(self, value: f32) -> Args {
        self.slot([u64::from(value.to_bits()), 0])
    }

    fn slot(mut self, slot: [u64; 2]) -> Args {
        self.slots.push(slot);
        self
    }
}

/// When a kernel may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Once the one before is done.
    Waits,
    /// While the one before ends; compute capability 9.0 and later.
    StartsEarly,
}

pub(super) fn launch(
    stream: sys::CUstream,
    kernel: &'static str,
    function: sys::CUfunction,
    grid: Grid,
    mut args: Args,
    order: Order,
) -> Result<()> {
    let mut pointers: Vec<*mut c_void> = args
        .slots
        .iter_mut()
        .map(|slot| std::ptr::from_mut(slot).cast())
        .collect();
    let mut early = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            programmaticStreamSerializationAllowed: 1,
        },
    };
    let [x, y, z] = grid.blocks;
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared_bytes as u32,
        hStream: stream,
        attrs: &mut early,
        numAttrs: u32::from(order == Order::StartsEarly),
    };
    // SAFETY: the caller's arguments match the kernel's parameters in number and size (each op's own launch code, checked by its
    // comparison with the CPU); the driver copies them and the attribute during the call.
    check(kernel, unsafe {
        sys::cuLaunchKernelEx(
            &config,
            function,
            pointers.as_mut_ptr(),
            std::ptr::null_mut(),
        )
        .result()
    })
}
