//! Ctrl-C: the first one asks for an orderly end (finish the step and save it, close the server), the second one ends the program.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// What a shell expects of a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// The flag that the first Ctrl-C raises. The handler is installed on the first call; without one (a platform that refuses),
/// Ctrl-C ends the program at once, and a run resumes from its last checkpoint.
pub fn flag() -> Arc<AtomicBool> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    let flag = FLAG.get_or_init(|| {
        let flag = Arc::new(AtomicBool::new(false));
        let raised = Arc::clone(&flag);
        let installed = ctrlc::set_handler(move || {
            if raised.swap(true, Ordering::SeqCst) {
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
