//! Replays the seeds of the fuzz targets (`fuzz/README.md`): the very functions that the fuzzer runs.

use std::path::Path;

#[test]
fn seeds_break_no_promise() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    let targets = [
        &corpus::fuzz::TARGETS[..],
        &hub::fuzz::TARGETS[..],
        &model::fuzz::TARGETS[..],
        &text::fuzz::TARGETS[..],
    ];
    for (name, target) in targets.into_iter().flatten() {
        let folder = tempfile::tempdir().unwrap();
        let mut paths: Vec<_> = std::fs::read_dir(seeds.join(name))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        paths.sort();
        assert!(!paths.is_empty(), "{name} has no seed");
        for path in paths {
            println!("{}", path.display());
            target(&std::fs::read(&path).unwrap(), folder.path());
        }
    }
}
