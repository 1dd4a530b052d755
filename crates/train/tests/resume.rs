//! A run that is killed and started again is, bit for bit, the run that was never stopped.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{job, listing, run_silently, timeless_metrics, tiny_model, weight_bits, with_adapter};
use train::{Error, Job, Progress, SetAside, Silent, StepReport};

/// Where a run dies.
#[derive(Clone, Copy, Debug)]
enum Death {
    /// After the line of this step was written, before any checkpoint of it.
    AfterStep(u64),
    /// While the held-out loss of this step is measured.
    InValidation(u64),
    /// Right after the checkpoint of this step.
    AfterCheckpoint(u64),
}

struct Doomed(Death);

impl Progress for Doomed {
    fn step(&mut self, report: &StepReport) {
        if matches!(self.0, Death::AfterStep(step) if step == report.line.step) {
            panic!("killed");
        }
    }
    fn validating(&mut self, step: u64, _done: u64, _all: u64) {
        if matches!(self.0, Death::InValidation(at) if at == step) {
            panic!("killed");
        }
    }
    fn checkpoint(&mut self, folder: &Path) {
        if matches!(self.0, Death::AfterCheckpoint(step) if folder.ends_with(format!("step-{step}")))
        {
            panic!("killed");
        }
    }
}

/// Runs until death. Nothing is tidied up: the folder is as a kill leaves it.
fn run_until(job: &Job, death: Death) {
    let mut doomed = Doomed(death);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        train::run(tiny_model(), job, &mut doomed).map(|_| ())
    }));
    assert!(outcome.is_err(), "{death:?} never came");
}

fn adapter_job(dir: &Path) -> Job {
    with_adapter(job(dir))
}

/// Kills a run at each of `deaths` in turn and compares it with an unbroken one.
fn check(make: fn(&Path) -> Job, deaths: &[Death]) {
    let unbroken = tempfile::tempdir().unwrap();
    let (model, summary) = run_silently(&make(unbroken.path()));
    let broken = tempfile::tempdir().unwrap();
    let job = make(broken.path());
    for death in deaths {
        run_until(&job, *death);
        // What a kill in the middle of a write can leave behind.
        let checkpoints = broken.path().join("checkpoints");
        let partial = checkpoints.join(".step-99.tmp");
        fs::create_dir_all(partial.join("model")).unwrap();
        fs::write(partial.join("optimizer.safetensors"), "half").unwrap();
        fs::write(checkpoints.join("last.tmp"), "st").unwrap();
        let metrics = broken.path().join("metrics.jsonl");
        let half_line = fs::read_to_string(&metrics).unwrap() + "{\"step\":1,\"epo";
        fs::write(&metrics, half_line).unwrap();
    }
    let (resumed_model, resumed_summary) = run_silently(&job);
    assert_eq!(
        timeless_metrics(broken.path()),
        timeless_metrics(unbroken.path())
    );
    assert_eq!(weight_bits(&resumed_model), weight_bits(&model));
    assert_eq!(resumed_summary.best, summary.best);
    assert_eq!(resumed_summary.account, summary.account);
    let result = summary.result.file_name().unwrap();
    for name in listing(&summary.result) {
        assert_eq!(
            fs::read(broken.path().join(result).join(&name)).unwrap(),
            fs::read(unbroken.path().join(result).join(&name)).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn resume_continues_bit_equal() {
    for death in [
        Death::AfterStep(1),
        Death::AfterStep(2),
        Death::AfterStep(5),
        Death::InValidation(0),
        Death::InValidation(8),
        Death::AfterCheckpoint(3),
        Death::AfterCheckpoint(10),
    ] {
        check(job, &[death]);
    }
}

#[test]
fn resume_survives_many_kills() {
    check(
        job,
        &[
            Death::InValidation(0),
            Death::AfterStep(4),
            Death::AfterStep(7),
            Death::InValidation(8),
            Death::AfterStep(9),
            Death::InValidation(10),
            Death::AfterCheckpoint(10),
        ],
    );
}

#[test]
fn resume_of_an_adapter_with_dropout_is_bit_equal() {
    check(adapter_job, &[Death::AfterStep(5), Death::InValidation(8)]);
}

#[test]
fn stop_flag_finishes_the_step_and_saves() {
    struct Stopper(Arc<AtomicBool>);
    impl Progress for Stopper {
        fn step(&mut self, report: &StepReport) {
            self.0.store(report.line.step == 4, Ordering::Relaxed);
        }
    }
    let unbroken = tempfile::tempdir().unwrap();
    let (model, _) = run_silently(&job(unbroken.path()));
    let stopped = tempfile::tempdir().unwrap();
    let job = job(stopped.path());
    let error = train::run(tiny_model(), &job, &mut Stopper(job.stop.clone())).unwrap_err();
    let Error::Interrupted { step, checkpoint } = &error else {
        panic!("{error}");
    };
    assert_eq!(*step, 4);
    assert!(checkpoint.join("state.json").is_file());
    // The held-out loss of step 4 was due, and is made up for by the next start.
    job.stop.store(false, Ordering::Relaxed);
    let (resumed, _) = run_silently(&job);
    assert_eq!(weight_bits(&resumed), weight_bits(&model));
    assert_eq!(
        timeless_metrics(stopped.path()),
        timeless_metrics(unbroken.path())
    );
}

#[test]
fn stop_before_the_first_step_loses_no_validation() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path());
    job.stop.store(true, Ordering::Relaxed);
    let error = train::run(tiny_model(), &job, &mut Silent).unwrap_err();
    assert!(
        matches!(error, Error::Interrupted { step: 0, .. }),
        "{error}"
    );
    job.stop.store(false, Ordering::Relaxed);
    run_silently(&job);
    assert_eq!(timeless_metrics(dir.path())[0]["split"], "val");
}

#[test]
fn a_finished_run_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path());
    let (model, first) = run_silently(&job);
    let metrics = fs::read(dir.path().join("metrics.jsonl")).unwrap();
    let (again, second) = run_silently(&job);
    assert_eq!(weight_bits(&again), weight_bits(&model));
    assert_eq!(fs::read(dir.path().join("metrics.jsonl")).unwrap(), metrics);
    assert_eq!(
        (second.train, second.validation),
        (first.train, first.validation)
    );
}

/// Damages a file of a checkpoint.
type Damage = fn(&Path);

fn flip_a_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(path, bytes).unwrap();
}

fn cut_short(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 5]).unwrap();
}

fn remove(path: &Path) {
    fs::remove_file(path).unwrap();
}

fn empty(path: &Path) {
    fs::write(path, "").unwrap();
}

/// What a run tells of damage.
#[derive(Default)]
struct Told(Vec<SetAside>);

impl Progress for Told {
    fn set_aside(&mut self, damaged: &SetAside) {
        self.0.push(damaged.clone());
    }
}

#[test]
fn a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken() {
    let unbroken = tempfile::tempdir().unwrap();
    let (model, _) = run_silently(&job(unbroken.path()));
    let files = [
        "state.json",
        "optimizer.safetensors",
        "model/model.safetensors",
        "model/config.json",
        "SHA256SUMS",
    ];
    let damages: [Damage; 4] = [flip_a_bit, cut_short, remove, empty];
    for file in files {
        for damage in damages {
            let dir = tempfile::tempdir().unwrap();
            let mut job = job(dir.path());
            job.run.keep_last = 2;
            run_until(&job, Death::AfterCheckpoint(6));
            let checkpoints = dir.path().join("checkpoints");
            damage(&checkpoints.join("step-6").join(file));
            let mut told = Told::default();
            let (resumed, _) = train::run(tiny_model(), &job, &mut told).unwrap();
            assert_eq!(weight_bits(&resumed), weight_bits(&model), "{file}");
            assert_eq!(
                timeless_metrics(dir.path()),
                timeless_metrics(unbroken.path())
            );
            let [damaged] = &told.0[..] else {
                panic!("{file}: {:?}", told.0)
            };
            assert_eq!(damaged.folder, checkpoints.join("damaged-step-6"));
            let last = fs::read_to_string(checkpoints.join("last")).unwrap();
            assert!(checkpoints.join(last.trim()).is_dir(), "{last}");
            assert!(
                damaged.folder.is_dir(),
                "what is damaged is kept for its owner"
            );
            // A damaged list may name anything.
            let named = file.rsplit('/').next().filter(|name| *name != "SHA256SUMS");
            let said = &damaged.problem;
            assert!(said.contains(named.unwrap_or_default()), "{file}: {said}");
        }
    }
}

#[test]
fn what_somebody_adds_to_a_checkpoint_is_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path());
    run_until(&job, Death::AfterCheckpoint(6));
    let checkpoints = dir.path().join("checkpoints");
    // A tokenizer to try it with, what a desktop leaves, and a copy under a name of one's own.
    fs::write(checkpoints.join("step-6/model/tokenizer.json"), "{}").unwrap();
    fs::write(checkpoints.join("step-6/.DS_Store"), "x").unwrap();
    fs::create_dir(checkpoints.join("step-0100")).unwrap();
    let mut told = Told::default();
    train::run(tiny_model(), &job, &mut told).unwrap();
    assert_eq!(told.0, []);
}

#[test]
fn where_no_checkpoint_is_whole_none_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path());
    run_until(&job, Death::AfterCheckpoint(3));
    cut_short(&dir.path().join("checkpoints/step-3/optimizer.safetensors"));
    for _ in 0..2 {
        let error = train::run(tiny_model(), &job, &mut Silent).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("step-3") && error.contains("optimizer.safetensors has other bytes"),
            "{error}"
        );
        assert!(dir.path().join("checkpoints/step-3").is_dir());
    }
}

#[test]
fn another_base_or_type_of_numbers_is_no_resume() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.base_sha256 = Some("aa".to_owned());
    run_until(&job, Death::AfterCheckpoint(3));
    job.base_sha256 = Some("bb".to_owned());
    let error = train::run(tiny_model(), &job, &mut Silent).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("base_sha256: was \"aa\", is \"bb\""),
        "{error}"
    );
    // A checkpoint from before either was remembered goes on as it did.
    let path = dir.path().join("checkpoints/step-3/state.json");
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state["version"] = 1.into();
    for key in ["base_sha256", "dtype"] {
        assert!(
            state["identity"]
                .as_object_mut()
                .unwrap()
                .remove(key)
                .is_some(),
            "{key}"
        );
    }
    fs::write(&path, state.to_string()).unwrap();
    fs::remove_file(path.with_file_name("SHA256SUMS")).unwrap();
    run_silently(&job);
}

#[test]
fn an_event_file_outside_the_run_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(&dir.path().join("run"));
    run_until(&job, Death::AfterCheckpoint(3));
    let victim = dir.path().join("victim");
    fs::write(&victim, "a diary").unwrap();
    let folder = dir.path().join("run/checkpoints/step-3");
    let path = folder.join("state.json");
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state["tensorboard"]["file_name"] = "../victim".into();
    state["tensorboard"]["bytes"] = 0.into();
    fs::write(&path, state.to_string()).unwrap();
    fs::remove_file(folder.join("SHA256SUMS")).unwrap();
    files::write_sums(&folder).unwrap();
    run_silently(&job);
    assert_eq!(fs::read_to_string(&victim).unwrap(), "a diary");
}

/// Set in the process that is killed: where it trains.
const CHILD_DIR: &str = "CYRENE_TEST_TRAIN_DIR";

#[test]
fn kill_dash_nine_loses_nothing() {
    if let Some(dir) = std::env::var_os(CHILD_DIR) {
        run_silently(&job(Path::new(&dir)));
        return;
    }
    let unbroken = tempfile::tempdir().unwrap();
    run_silently(&job(unbroken.path()));
    let killed = tempfile::tempdir().unwrap();
    let metrics = killed.path().join("metrics.jsonl");
    let length = || fs::metadata(&metrics).map_or(0, |metadata| metadata.len());
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kill_dash_nine_loses_nothing"])
            .env(CHILD_DIR, killed.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Some lines further than the last child got, wherever that is in a step, a validation or a checkpoint.
        let goal = length() + 700;
        while length() < goal && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    run_silently(&job(killed.path()));
    assert_eq!(
        timeless_metrics(killed.path()),
        timeless_metrics(unbroken.path())
    );
    let weights = |dir: &Path| fs::read(dir.join("model/model.safetensors")).unwrap();
    assert_eq!(weights(killed.path()), weights(unbroken.path()));
}

#[test]
fn state_that_no_run_can_have_written_is_refused_with_key_and_range() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.run.steps = Some(3);
    run_silently(&job);
    let folder = dir.path().join("checkpoints/step-3");
    let path = folder.join("state.json");
    let written = fs::read(&path).unwrap();
    for (key, value) in [
        ("elapsed_s", serde_json::json!(-1)),
        ("elapsed_s", serde_json::json!(1e300)),
        ("step", serde_json::json!(u64::MAX)),
        ("total_steps", serde_json::json!(1_u64 << 40)),
        ("validated_step", serde_json::json!(4)),
    ] {
        let mut state: serde_json::Value = serde_json::from_slice(&written).unwrap();
        state[key] = value;
        fs::write(&path, state.to_string()).unwrap();
        files::write_sums(&folder).unwrap();
        let error = train::run(tiny_model(), &job, &mut Silent).unwrap_err();
        assert!(matches!(error, Error::StateValue { .. }), "{key}: {error}");
        let error = error.to_string();
        assert!(error.contains(&format!("`{key}` is")), "{error}");
        assert!(
            error.contains("state.json") && error.contains("from 0 to"),
            "{error}"
        );
    }
}
