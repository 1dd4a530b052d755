//! The checkpoint reader as a function of bytes that anybody may have written, for the fuzzer and for the test that
//! replays its seeds (`fuzz/README.md`). A target panics when a promise is broken.

use std::path::Path;

use crate::checkpoint::Checkpoint;

/// A target: bytes, and a folder to lay files in.
pub type Target = fn(&[u8], &Path);

/// All targets by name; the seeds of each lie in `fuzz/seeds/<name>`.
pub const TARGETS: [(&str, Target); 1] = [("safetensors", safetensors)];

/// A file of weights: every tensor that the header names has all its bytes, and an error names the file.
fn safetensors(data: &[u8], folder: &Path) {
    let written = std::fs::write(folder.join("model.safetensors"), data);
    assert!(written.is_ok(), "{written:?}");
    match Checkpoint::open(folder) {
        Ok(checkpoint) => {
            for name in checkpoint.names() {
                let view = checkpoint.get(name);
                assert!(view.is_some_and(|view| {
                    let bits = view.shape.iter().product::<usize>() * view.dtype.bitsize();
                    bits == 8 * view.bytes.len()
                }));
            }
        }
        Err(error) => assert!(error.to_string().contains("model.safetensors"), "{error}"),
    }
}
