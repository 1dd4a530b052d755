//! The machine that this runs on: processor, memory, disk, and what it lacks to use a GPU.

use std::path::Path;

use kernel::host::HostMemory;
use serde::Serialize;

use crate::ui::size;

/// The machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// `cpu` or `cuda:0`.
    pub device: String,
    /// Name of the CPU.
    pub processor: String,
    /// The instructions that the CPU's arithmetic has chosen.
    pub vectors: &'static str,
    /// Threads that it runs at once.
    pub threads: usize,
    /// Memory of the device.
    pub memory_bytes: u64,
    /// What of it is free.
    pub memory_free_bytes: u64,
    /// Free on the disk of the working folder; None where the system does not say.
    pub disk_free_bytes: Option<u64>,
    /// What is missing to use a GPU; None where there is one that can be used.
    pub gpu_missing: Option<String>,
}

impl Machine {
    /// Looks at the machine; `place` decides which disk.
    pub fn here(place: &Path) -> Self {
        let mut system = sysinfo::System::new();
        system.refresh_cpu_all();
        let memory = HostMemory::now();
        let processor = system
            .cpus()
            .first()
            .map_or("unknown processor".to_owned(), |cpu| {
                cpu.brand().trim().to_owned()
            });
        Machine {
            device: "cpu".to_owned(),
            processor,
            vectors: kernel::cpu_vectors(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory.total_bytes,
            memory_free_bytes: memory.available_bytes,
            disk_free_bytes: files::disk_free(place),
            gpu_missing: kernel::cuda::missing().map(|missing| missing.to_string()),
        }
    }

    /// A line for the terminal.
    pub fn describe(&self) -> String {
        let disk = self.disk_free_bytes.map_or(String::new(), |bytes| {
            format!(" · {} of disk free", size(bytes))
        });
        let gpu = self.gpu_missing.as_ref().map_or(String::new(), |missing| {
            format!("\nno GPU that this program can use: {missing}")
        });
        format!(
            "{} ({}) · {} threads · {} of {} memory free{disk}{gpu}",
            self.processor,
            self.vectors,
            self.threads,
            size(self.memory_free_bytes),
            size(self.memory_bytes)
        )
    }
}
