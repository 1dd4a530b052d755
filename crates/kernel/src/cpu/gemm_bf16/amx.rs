//! `tdpbf16ps`: a tile of 16 by 16 sums in f32 adds the products of 16 lines of 32 terms and 16 columns of as many.
//!
//! In assembly, since the compiler's names for it are not stable. Each block of sums configures the tiles, uses them and gives them
//! up in one piece of it, so that no other code ever runs with tiles in use.
#![expect(
    unsafe_code,
    reason = "the instructions of one processor and not of another"
)]

use std::arch::asm;
use std::arch::x86_64::_xgetbv;

use half::bf16;

use super::avx512::{Avx512Bf16, cpuid};
use super::{Instructions, LANES, Microkernel, Rows, Sums, TileMicrokernel, ViewMut, WIDTH};

/// Bits of CPUID's leaf 7, register EDX.
const AMX_BF16: u32 = 1 << 22;
const AMX_TILE: u32 = 1 << 24;
/// Bit of CPUID's leaf 1, register ECX: the operating system lets programs read XCR0.
const OSXSAVE: u32 = 1 << 27;
/// Bits of XCR0: the operating system saves the tiles' configuration and their data.
const TILE_STATE: u64 = 1 << 17 | 1 << 18;

/// Proof that this processor has AMX for bf16 and that this process may use it: nothing but `detect` makes one.
#[derive(Clone, Copy)]
pub(crate) struct AmxBf16 {
    vectors: Avx512Bf16,
}

impl AmxBf16 {
    /// Asks processor and operating system; on Linux it asks for the permission that a process needs. `None` where either has not
    /// got it, where it is refused, and on other operating systems.
    pub(super) fn detect(vectors: Avx512Bf16) -> Option<Self> {
        let is_there = cpuid(0, 0).eax >= 7
            && cpuid(7, 0).edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE
            && cpuid(1, 0).ecx & OSXSAVE != 0;
        // SAFETY: OSXSAVE says that a program may read the register.
        let is_saved = is_there && unsafe { read_xcr0() } & TILE_STATE == TILE_STATE;
        (is_saved && is_permitted()).then_some(AmxBf16 { vectors })
    }
}

/// Which parts of the processor's state the operating system saves.
#[target_feature(enable = "xsave")]
fn read_xcr0() -> u64 {
    // SAFETY: the function's own precondition, and that the operating system allows it; register 0 always exists.
    unsafe { _xgetbv(0) }
}

/// Linux gives the tiles' state to processes that ask for it before they use it; all threads then have it.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const SYS_ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let mut result = SYS_ARCH_PRCTL;
    // SAFETY: the call takes two numbers and touches no memory of the program; `rcx` and `r11` are what a system call overwrites.
    unsafe {
        asm!(
            "syscall",
            inout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack, nomem),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// What `ldtilecfg` reads: bytes across and rows of each tile, of which all eight are 16 rows of 64 bytes here.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const FULL_TILES: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// [`TileMicrokernel::block`] for one step or more.
///
/// # Safety
/// The processor has AMX for bf16 and the process may use it; `a` and `b` are `n_steps` > 0 times 2 KB to read.
unsafe fn block(sums: &mut Sums, a: *const u32, b: *const u32, n_steps: usize) {
    // SAFETY: the caller vouches for instructions and operands; the four tiles of sums end within `sums`, 32 rows of 128 bytes.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a} + {line}]",
            "tileloadd tmm6, [{b} + {wide}]",
            "tileloadd tmm7, [{b} + {wide} + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a} + {line} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 2048",
            "add {b}, 2048",
            "dec {n_steps}",
            "jnz 2b",
            "tilestored [{sums} + {wide}], tmm0",
            "tilestored [{sums} + {wide} + 64], tmm1",
            "tilestored [{sums} + {wide} + 2048], tmm2",
            "tilestored [{sums} + {wide} + 2112], tmm3",
            "tilerelease",
            config = in(reg) &FULL_TILES,
            a = inout(reg) a => _,
            b = inout(reg) b => _,
            n_steps = inout(reg) n_steps => _,
            sums = in(reg) sums.0.as_mut_ptr(),
            line = in(reg) 4 * LANES,
            wide = in(reg) 4 * WIDTH,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

impl Instructions for AmxBf16 {
    #[inline(always)]
    fn transpose(self, block: &mut [[u32; LANES]; LANES]) {
        self.vectors.transpose(block);
    }

    #[inline(always)]
    fn write(self, dst: ViewMut, sums: &[f32], alpha: f32, beta: f32) {
        self.vectors.write(dst, sums, alpha, beta);
    }

    #[inline(always)]
    fn prefetch(self, data: &[bf16]) {
        self.vectors.prefetch(data);
    }

    #[inline(always)]
    fn run(self, body: impl FnMut()) {
        self.vectors.run(body);
    }
}

impl Microkernel for AmxBf16 {
    const ROWS: usize = WIDTH;
    const COLUMNS: usize = WIDTH;
    const PAIRS: usize = LANES;

    fn compute(self, rows: Rows) {
        rows.compute_in_tiles(self);
    }
}

impl TileMicrokernel for AmxBf16 {
    fn block(self, sums: &mut Sums, a: &[[[u32; LANES]; WIDTH]], b: &[[[u32; WIDTH]; LANES]]) {
        assert!(
            !a.is_empty() && a.len() == b.len(),
            "steps of both operands"
        );
        // SAFETY: `self` proves instructions and permission; a step of either operand is 2 KB, and there are as many of both.
        unsafe { block(sums, a.as_ptr().cast(), b.as_ptr().cast(), a.len()) }
    }
}
