//! The host's memory: how much there is, and how much of it a GPU's copies may be promised.

use sysinfo::System;

/// What stays free for everything else: the copy of the largest tensor while a checkpoint is written (2 GB of the 9B's table), the
/// system, other programs. Page-locked memory cannot be swapped out, so too little here ends with a killed process.
const SPARED_BYTES: u64 = 4 << 30;

/// The machine's name in its network; `this machine` where it has none.
pub fn name() -> String {
    System::host_name().unwrap_or_else(|| "this machine".to_owned())
}

/// Bytes of this machine, or of the part of it that this process's container may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total_bytes: u64,
    /// What can be had now without swapping; files in the cache count as free.
    pub available_bytes: u64,
}

impl HostMemory {
    /// What there is now.
    pub fn now() -> HostMemory {
        let mut system = System::new();
        system.refresh_memory();
        let total_bytes = system.total_memory();
        let machine = HostMemory {
            total_bytes,
            available_bytes: system.available_memory(),
        };
        // Asked of a system that tells nothing of its memory, sysinfo panics.
        let limits = (total_bytes > 0).then(|| system.cgroup_limits()).flatten();
        match limits {
            Some(limits) => machine.within(limits.total_memory, limits.rss),
            None => machine,
        }
    }

    /// As far as a container's limit allows, of which `used_bytes` are not files in the cache.
    fn within(self, limit_bytes: u64, used_bytes: u64) -> HostMemory {
        HostMemory {
            total_bytes: self.total_bytes.min(limit_bytes),
            available_bytes: (self.available_bytes).min(limit_bytes.saturating_sub(used_bytes)),
        }
    }

    /// Bytes that may be page-locked. Windows locks at most half of its memory for GPUs.
    pub fn lockable_bytes(self) -> usize {
        let spared = self.available_bytes.saturating_sub(SPARED_BYTES);
        let most = if cfg!(windows) {
            self.total_bytes / 2
        } else {
            self.total_bytes
        };
        spared.min(most) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_container_has_what_its_limit_leaves() {
        let machine = HostMemory {
            total_bytes: 512 * GIB,
            available_bytes: 400 * GIB,
        };
        let within = machine.within(128 * GIB, 20 * GIB);
        assert_eq!(within.total_bytes, 128 * GIB);
        assert_eq!(within.available_bytes, 108 * GIB);
        assert_eq!(machine.within(u64::MAX, 20 * GIB), machine);
        assert_eq!(machine.within(GIB, 2 * GIB).available_bytes, 0);
    }

    #[test]
    fn some_memory_stays_unlocked() {
        let memory = HostMemory {
            total_bytes: 32 * GIB,
            available_bytes: 15 * GIB,
        };
        assert_eq!(memory.lockable_bytes(), 11 << 30);
        let full = HostMemory {
            available_bytes: GIB,
            ..memory
        };
        assert_eq!(full.lockable_bytes(), 0);
        let now = HostMemory::now();
        assert!(now.available_bytes <= now.total_bytes);
    }
}
