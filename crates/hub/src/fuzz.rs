//! The Hub's answer as a function of bytes that anybody may have written, for the fuzzer and for the test that replays its
//! seeds (`fuzz/README.md`). A target panics when a promise is broken.

use std::collections::HashSet;
use std::path::{Component, Path};

use serde_json::Value;

use crate::answer;
use crate::name::HubId;
use crate::snapshot::{MAX_BYTES, MAX_FILES, Snapshot};

/// A target: bytes, and a folder it may lay files in.
pub type Target = fn(&[u8], &Path);

/// All targets by name; the seeds of each lie in `fuzz/seeds/<name>`.
pub const TARGETS: [(&str, Target); 1] = [("hub_answer", hub_answer)];

/// A list of a repository's files: what is taken from it are the wanted files that it names, each a plain name in the folder, and
/// the record of them says the same; an error is short and moves no terminal.
fn hub_answer(data: &[u8], folder: &Path) {
    let Ok(id) = HubId::parse("someone/Tiny") else {
        panic!("an ordinary id is refused");
    };
    let snapshot = match answer::read(&id, data) {
        Ok(snapshot) => snapshot,
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() < 4000, "{} bytes", text.len());
            assert!(!text.contains(char::is_control), "{text:?}");
            return;
        }
    };

    // 1. as a plain second reading of the JSON has it, unless what is passed over there is none
    let files = snapshot.files();
    let taken: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    if let Ok(value) = serde_json::from_slice::<Value>(data) {
        assert_eq!(value["sha"], snapshot.commit().as_str());
        let listed = value["siblings"].as_array().map_or(&[][..], Vec::as_slice);
        let names = listed.iter().filter_map(|file| file["rfilename"].as_str());
        let wanted: Vec<&str> = names.filter(|name| answer::is_wanted(name)).collect();
        assert_eq!(taken, wanted);
    }

    // 2. nothing outside the folder, nothing on top of something else
    let mut seen = HashSet::new();
    for name in taken {
        let path = folder.join(name);
        assert_eq!(path.parent(), Some(folder), "{name:?}");
        let last = path.components().next_back();
        assert!(matches!(last, Some(Component::Normal(_))), "{name:?}");
        assert!(seen.insert(name.to_lowercase()), "{name:?}");
    }
    assert!(files.len() <= MAX_FILES && snapshot.bytes() <= MAX_BYTES);

    // 3. the record
    let record = serde_json::to_vec(&snapshot).unwrap_or_default();
    let read = serde_json::from_slice::<Snapshot>(&record);
    assert!(read.is_ok_and(|read| read == snapshot));
}
