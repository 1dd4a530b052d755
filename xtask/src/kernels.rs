//! Compiles every kernel for every generation of GPU, without one, and says what each takes: registers, spills, shared memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use kernel::Error;
use kernel::cuda::{self, SOURCES, Source};
use serde_json::json;

/// Compute capabilities as 10 · major + minor: A100, RTX 30, RTX 40, H100, B200, RTX 50.
const CAPABILITIES: &[u32] = &[80, 86, 89, 90, 100, 120];

/// What a block may have of shared memory that is declared in the kernel; more must be asked for at the launch.
const STATIC_SHARED_BYTES: u32 = 48 << 10;

/// Kernels that may spill registers: (kernel, most bytes that a thread stores on any GPU, why that is accepted).
const SPILLS: &[(&str, u32, &str)] = &[
    ("gated_delta_rule_scan", 4, EXACT),
    ("rms_norm_forward_any", 4, EXACT),
    ("attention_backward_keys_warpgroups_256", 4, FULL),
    ("gated_delta_rule_bf16_gradient", 100, FULL),
    ("gated_delta_rule_bf16_prepare", 4, FULL),
    ("decode_product_plain_1", 4, FULL),
    ("decode_product_wide_1", 4, FULL),
    ("decode_product_residual_1", 24, FULL),
    ("decode_product_plain_4", 4, FULL),
    ("decode_product_wide_4", 4, FULL),
    ("decode_product_swiglu_4", 4, FULL),
    ("decode_product_residual_4", 12, FULL),
    ("decode_attention_part_1", 12, BLACKWELL),
    ("decode_attention_part_2", 28, BLACKWELL),
    ("decode_attention_part_4", 36, BLACKWELL),
    ("decode_attention_part_6", 36, BLACKWELL),
    ("decode_attention_part_8", 36, BLACKWELL),
    ("decode_delta_net", 84, BLACKWELL),
    ("top_candidates_select", 16, FULL),
];
const EXACT: &str = "the path for f32 and mixed types, which is there to be exact";
const FULL: &str = "its tiles fill the registers that its blocks a multiprocessor leave";
const BLACKWELL: &str = "two blocks a multiprocessor leave it 128 registers (the delta net's 64), and for sm_100a and sm_120a alone the compiler wants more; what that costs there was not measured";

const USAGE: &str = "cargo xtask kernels [FILE ..] [--arch 80,90a,..] [--nvrtc DIR] [--json]";

const NO_NVRTC: &str = "NVRTC was not found on the library path; without an installation of CUDA:
  python3 -m pip install --no-deps --target target/nvrtc 'nvidia-cuda-nvrtc==13.*'
  cargo xtask kernels --nvrtc target/nvrtc";

pub fn run(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    if let Some(dir) = &options.nvrtc {
        let folder = library_folder(dir, 5)
            .with_context(|| format!("no libnvrtc in {}; {NO_NVRTC}", dir.display()))?;
        cuda::load_nvrtc(&folder).with_context(|| folder.display().to_string())?;
    }
    let results = compile_all(&options);
    let mut kernels = Vec::new();
    let mut faults = Vec::new();
    for result in results {
        match result {
            Ok((found, remarks)) => {
                kernels.extend(found);
                remarks.iter().for_each(|remark| eprintln!("{remark}"));
            }
            Err(Error::NoNvrtc) => bail!(NO_NVRTC),
            Err(error) => faults.push(error.to_string()),
        }
    }
    faults.extend(kernels.iter().filter_map(Kernel::fault));
    for (name, ..) in SPILLS.iter().filter(|(name, ..)| is_stale(name, &kernels)) {
        eprintln!("{name} spills nothing any more: take it off the list in xtask/src/kernels.rs");
    }
    if options.json {
        let all: Vec<_> = kernels.iter().map(Kernel::json).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        table(&kernels, &options.capabilities);
    }
    if faults.is_empty() {
        return Ok(());
    }
    for fault in &faults {
        eprintln!("{fault}");
    }
    bail!("{} faults", faults.len())
}

struct Options {
    sources: Vec<&'static Source>,
    capabilities: Vec<u32>,
    nvrtc: Option<PathBuf>,
    json: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Options> {
        let mut options = Options {
            sources: Vec::new(),
            capabilities: Vec::new(),
            nvrtc: None,
            json: false,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().context(USAGE);
            match arg.as_str() {
                "--json" => options.json = true,
                "--nvrtc" => options.nvrtc = Some(value()?.into()),
                "--arch" => {
                    for name in value()?.split(',') {
                        options.capabilities.push(capability(name)?);
                    }
                }
                option if option.starts_with('-') => bail!("unknown {option}: {USAGE}"),
                name => options.sources.push(source(name)?),
            }
        }
        if options.sources.is_empty() {
            options.sources = SOURCES.to_vec();
        }
        if options.capabilities.is_empty() {
            options.capabilities = CAPABILITIES.to_vec();
        }
        Ok(options)
    }
}

/// `90`, `90a` or `sm_90a`.
fn capability(name: &str) -> Result<u32> {
    let number = name.trim_start_matches("sm_").trim_end_matches('a');
    number
        .parse()
        .with_context(|| format!("`{name}` is no architecture such as 90a"))
}

/// A file by its name, with or without `.cu` and the folders before it.
fn source(name: &str) -> Result<&'static Source> {
    let stem = Path::new(name).file_stem().unwrap_or_default();
    let found = SOURCES.iter().find(|source| stem == source.name);
    found
        .copied()
        .with_context(|| format!("no kernel file `{name}` in kernel::cuda::SOURCES"))
}

/// The folder at or below `dir` that holds the library; wheels have it some folders down.
fn library_folder(dir: &Path, depth: usize) -> Option<PathBuf> {
    let paths: Vec<PathBuf> = std::fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    let is_library = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libnvrtc.") || name.starts_with("nvrtc64_")
    };
    if paths.iter().any(is_library) {
        return Some(dir.to_owned());
    }
    let below = depth.checked_sub(1)?;
    paths
        .iter()
        .filter(|path| path.is_dir())
        .find_map(|path| library_folder(path, below))
}

type Outcome = kernel::Result<(Vec<Kernel>, Vec<String>)>;

/// One outcome for each file and capability, in order; a thread for each core takes the next that is left.
fn compile_all(options: &Options) -> Vec<Outcome> {
    let capabilities = &options.capabilities;
    let jobs: Vec<(&Source, u32)> = options
        .sources
        .iter()
        .flat_map(|source| capabilities.iter().map(|compute| (*source, *compute)))
        .collect();
    let next = AtomicUsize::new(0);
    let done = Mutex::new(BTreeMap::new());
    let work = || {
        loop {
            let idx = next.fetch_add(1, Ordering::Relaxed);
            let Some((source, compute)) = jobs.get(idx) else {
                return;
            };
            let outcome = cuda::compile_verbose(source, *compute)
                .map(|compiled| read_log(source.name, *compute, &compiled.log));
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            done.insert(idx, outcome);
        }
    };
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..n_threads.min(jobs.len()) {
            scope.spawn(work);
        }
    });
    let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.into_values().collect()
}

/// What the assembler says of one kernel for one capability.
#[derive(Debug, Default, PartialEq)]
struct Kernel {
    file: &'static str,
    name: String,
    compute: u32,
    registers: u32,
    stack_bytes: u32,
    spill_store_bytes: u32,
    spill_load_bytes: u32,
    /// Declared in the kernel; what a launch asks for comes on top.
    shared_bytes: u32,
}

impl Kernel {
    fn fault(&self) -> Option<String> {
        let Kernel {
            file,
            name,
            spill_store_bytes,
            shared_bytes,
            ..
        } = self;
        let arch = cuda::architecture(self.compute);
        if *shared_bytes > STATIC_SHARED_BYTES {
            return Some(format!(
                "{file}.cu: {name} declares {shared_bytes} bytes of shared memory for {arch}, above {STATIC_SHARED_BYTES}"
            ));
        }
        let entry = SPILLS.iter().find(|(kernel, ..)| name == kernel);
        let allowed = entry.map_or(0, |(_, bytes, _)| *bytes);
        (*spill_store_bytes > allowed).then(|| {
            format!(
                "{file}.cu: {name} spills {spill_store_bytes} bytes of registers for {arch} ({allowed} allowed)"
            )
        })
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "file": self.file,
            "kernel": self.name,
            "arch": cuda::architecture(self.compute),
            "registers": self.registers,
            "stack_bytes": self.stack_bytes,
            "spill_store_bytes": self.spill_store_bytes,
            "spill_load_bytes": self.spill_load_bytes,
            "shared_bytes": self.shared_bytes,
        })
    }
}

/// Whether a kernel, compiled now for all of them, has no need of its allowance.
fn is_stale(name: &str, kernels: &[Kernel]) -> bool {
    let compiled = kernels.iter().filter(|kernel| kernel.name == name);
    let spills: Vec<u32> = compiled.map(|kernel| kernel.spill_store_bytes).collect();
    spills.len() == CAPABILITIES.len() && spills.iter().all(|bytes| *bytes == 0)
}

/// Kernels, and remarks such as instructions that the assembler had to serialise.
fn read_log(file: &'static str, compute: u32, log: &str) -> (Vec<Kernel>, Vec<String>) {
    let mut kernels: Vec<Kernel> = Vec::new();
    let mut remarks = Vec::new();
    for line in log.lines() {
        if let Some(name) = between(line, "Compiling entry function '", "'") {
            kernels.push(Kernel {
                file,
                name: name.to_owned(),
                compute,
                ..Kernel::default()
            });
        } else if line.contains("warning") || line.contains("Performance Loss") {
            let arch = cuda::architecture(compute);
            remarks.push(format!("{file}.cu for {arch}: {}", line.trim()));
        }
        // What a function that was not inlined spills counts for the kernel before it.
        if let Some(kernel) = kernels.last_mut() {
            kernel.stack_bytes += number_before(line, " bytes stack frame");
            kernel.spill_store_bytes += number_before(line, " bytes spill stores");
            kernel.spill_load_bytes += number_before(line, " bytes spill loads");
            kernel.registers = kernel.registers.max(number_before(line, " registers"));
            kernel.shared_bytes = kernel.shared_bytes.max(number_before(line, " bytes smem"));
        }
    }
    kernels.sort_by(|a, b| a.name.cmp(&b.name));
    (kernels, remarks)
}

fn between<'a>(line: &'a str, start: &str, end: &str) -> Option<&'a str> {
    line.split_once(start)?
        .1
        .split_once(end)
        .map(|(text, _)| text)
}

/// The number in front of `unit`, 0 where the line has none.
fn number_before(line: &str, unit: &str) -> u32 {
    let number = line
        .split_once(unit)
        .and_then(|(before, _)| before.rsplit([' ', ',']).next());
    number.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// A line a kernel, a column a capability.
fn table(kernels: &[Kernel], capabilities: &[u32]) {
    let mut rows: BTreeMap<(&str, &str), BTreeMap<u32, &Kernel>> = BTreeMap::new();
    for kernel in kernels {
        let row = rows.entry((kernel.file, &kernel.name)).or_default();
        row.insert(kernel.compute, kernel);
    }
    let width = kernels.iter().map(|kernel| kernel.name.len()).max();
    let width = width.unwrap_or(0).max("kernel".len());
    let line = |name: &str, cells: Vec<String>| {
        let cells: String = cells.iter().map(|cell| format!(" {cell:>13}")).collect();
        println!("{name:width$}{cells}");
    };
    println!("registers / bytes spilled / bytes of shared memory declared");
    let names = capabilities.iter().map(|c| cuda::architecture(*c));
    line("kernel", names.collect());
    for ((_, name), row) in rows {
        let cells = capabilities.iter().map(|compute| {
            row.get(compute).map_or_else(String::new, |kernel| {
                let Kernel {
                    registers,
                    spill_store_bytes,
                    shared_bytes,
                    ..
                } = kernel;
                format!("{registers}/{spill_store_bytes}/{shared_bytes}")
            })
        });
        line(name, cells.collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'b_forward' for 'sm_90a'
ptxas info    : Function properties for b_forward
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 8 bytes cumulative stack size, 8192 bytes smem
ptxas info    : Compiling entry function 'a_forward' for 'sm_90a'
ptxas info    : Function properties for a_forward
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, 65536 bytes smem, 396 bytes cmem[0]
";

    #[test]
    fn log_gives_every_kernel_and_every_remark() {
        let (kernels, remarks) = read_log("x", 90, LOG);
        let kernel = |name: &str| Kernel {
            file: "x",
            name: name.to_owned(),
            compute: 90,
            ..Kernel::default()
        };
        let a = Kernel {
            registers: 255,
            shared_bytes: 65_536,
            ..kernel("a_forward")
        };
        let b = Kernel {
            registers: 32,
            stack_bytes: 8,
            spill_store_bytes: 4,
            spill_load_bytes: 12,
            shared_bytes: 8192,
            ..kernel("b_forward")
        };
        assert_eq!(kernels, [a, b]);
        assert_eq!(remarks.len(), 1);
    }

    #[test]
    fn spills_and_much_shared_memory_are_faults() {
        let (kernels, _) = read_log("x", 90, LOG);
        let faults: Vec<String> = kernels.iter().filter_map(Kernel::fault).collect();
        assert_eq!(
            faults,
            [
                "x.cu: a_forward declares 65536 bytes of shared memory for sm_90a, above 49152",
                "x.cu: b_forward spills 4 bytes of registers for sm_90a (0 allowed)",
            ]
        );
    }

    #[test]
    fn names_of_files_and_architectures_are_read_as_people_write_them() {
        assert_eq!(
            source("crates/kernel/src/ops/copy.cu").unwrap().name,
            "copy"
        );
        assert_eq!(source("copy").unwrap().name, "copy");
        assert!(source("nothing").is_err());
        for name in ["90", "90a", "sm_90a"] {
            assert_eq!(capability(name).unwrap(), 90);
        }
        assert!(capability("hopper").is_err());
    }
}
