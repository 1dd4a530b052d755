//! Ctrl-C and the system's wish to end a program (SIGTERM; on Windows a closing console): the first one asks for an orderly end (finish the step and save it, close the server), the second one ends the program.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// What a shell expects of a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// A launcher passes on a Ctrl-C that the terminal has sent to all processes already: for so long the second is the first again.
const ECHO: Duration = Duration::from_secs(5);
static LAUNCHED: AtomicBool = AtomicBool::new(false);

/// Says that a launcher started this process.
pub fn expect_echo() {
    LAUNCHED.store(true, Ordering::SeqCst);
}

/// The flag that the first Ctrl-C raises. The handler is installed on the first call; without one (a platform that refuses),
/// Ctrl-C ends the program at once, and a run resumes from its last checkpoint.
pub fn flag() -> Arc<AtomicBool> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    let flag = FLAG.get_or_init(|| {
        let flag = Arc::new(AtomicBool::new(false));
        let raised = Arc::clone(&flag);
        let first = OnceLock::new();
        let installed = ctrlc::set_handler(move || {
            let since_first = first.get_or_init(Instant::now).elapsed();
            let is_echo = LAUNCHED.load(Ordering::SeqCst) && since_first < ECHO;
            if raised.swap(true, Ordering::SeqCst) && !is_echo {
                std::process::exit(INTERRUPTED);
            }
        });
        if let Err(error) = installed {
            tracing::warn!(%error, "no Ctrl-C handler");
        }
        flag
    });
    Arc::clone(flag)
}
