//! The most memory that this process has had: what the system remembers, or where it does not say, what a thread saw.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Watches this process from its creation on.
#[derive(Debug)]
pub struct PeakMemory {
    watcher: Option<JoinHandle<()>>,
    seen: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
}

impl PeakMemory {
    /// Begins to watch.
    pub fn watch() -> PeakMemory {
        let seen = Arc::new(AtomicU64::new(0));
        let is_over = Arc::new(AtomicBool::new(false));
        let watcher = remembered().is_none().then(|| {
            let (seen, is_over) = (seen.clone(), is_over.clone());
            std::thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    seen.fetch_max(resident(), Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(10));
                }
            })
        });
        PeakMemory {
            watcher,
            seen,
            is_over,
        }
    }

    /// Most bytes of main memory so far.
    pub fn bytes(&self) -> u64 {
        remembered().unwrap_or_else(|| self.seen.load(Ordering::Relaxed).max(resident()))
    }
}

impl Drop for PeakMemory {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(watcher) = self.watcher.take() {
            // It cannot fail, and were it to, only a figure would be too low.
            let _ = watcher.join();
        }
    }
}

/// What Linux remembers; `None` elsewhere.
fn remembered() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// What the process has now; 0 where the system does not say.
fn resident() -> u64 {
    let Ok(pid) = sysinfo::get_current_pid() else {
        return 0;
    };
    let mut system = sysinfo::System::new();
    system.refresh_processes(sysinfo::ProcessesToUpdate::Some(&[pid]), false);
    system.process(pid).map_or(0, sysinfo::Process::memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_is_at_least_what_is_there() {
        let peak = PeakMemory::watch();
        let bytes = vec![1u8; 32 << 20];
        assert!(resident() > bytes.iter().map(|b| u64::from(*b)).sum());
        assert!(peak.bytes() >= 32 << 20);
    }
}
