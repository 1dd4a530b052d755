//! Several ranks learn what one learns, go on from each other's checkpoints, and never wait for one that is gone.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    job, listing, metrics, run_silently, timeless_metrics, tiny_model, train_lines, weight_bits,
    with_adapter,
};
use kernel::Device;
use model::Model;
use train::ranks::{Limits, Place, Ranks};
use train::{Error, Job, Progress, Result, Silent, StepReport};

/// Losses, relative: gradients of several ranks are added in another order.
const LOSS_REL: f64 = 1e-5;
/// Weights, absolute, at a learning rate of 2e-3: AdamW divides by the root of the second moment, so that the last bit of a tiny
/// gradient counts.
const WEIGHT_ABS: f32 = 2e-4;

const LIMITS: Limits = Limits {
    rendezvous: Duration::from_secs(60),
    collective: Duration::from_secs(60),
    silence: Duration::from_secs(30),
    heartbeat: Duration::from_millis(200),
};

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn place(rank: usize, n_ranks: usize, port: u16) -> Place {
    Place {
        rank,
        n_ranks,
        host: "127.0.0.1".to_owned(),
        ports: vec![port],
        run: "a test".to_owned(),
    }
}

/// Runs `body` on every rank in a thread of its own; rank by rank what came back, None where it panicked.
fn ranks<T: Send + 'static>(
    n_ranks: usize,
    body: impl Fn(Ranks) -> Result<T> + Send + Sync + 'static,
) -> Vec<Option<Result<T>>> {
    let port = free_port();
    let body = Arc::new(body);
    let threads: Vec<_> = (0..n_ranks)
        .map(|rank| {
            let body = Arc::clone(&body);
            thread::spawn(move || {
                let ranks = Ranks::join(&place(rank, n_ranks, port), LIMITS, Device::Cpu)?;
                let outcome = body(ranks.clone());
                match &outcome {
                    Err(error) if !error.is_of_all_ranks() => ranks.fail(&error.to_string()),
                    _ => ranks.leave(),
                }
                outcome
            })
        })
        .collect();
    threads
        .into_iter()
        .map(|thread| thread.join().ok())
        .collect()
}

/// Twelve steps of four micro-batches, the last of each epoch fewer.
fn long_job(out_dir: &Path) -> Job {
    let mut job = job(out_dir);
    job.batch.accumulate = 4;
    job.run.steps = Some(12);
    job
}

fn adapter_job(out_dir: &Path) -> Job {
    with_adapter(long_job(out_dir))
}

/// The folder of a rank: only rank 0's is written to.
fn folder_of(out_dir: &Path, rank: usize) -> PathBuf {
    match rank {
        0 => out_dir.to_path_buf(),
        rank => out_dir.join(format!("never-made-{rank}")),
    }
}

/// Trains on `n_ranks`; the models by rank.
fn train_on(n_ranks: usize, out_dir: &Path, make: fn(&Path) -> Job) -> Vec<Model> {
    train_unequal(n_ranks, out_dir, move |_, folder| make(folder))
}

/// As [`train_on`], with a job that each rank makes by its number.
fn train_unequal(
    n_ranks: usize,
    out_dir: &Path,
    make: impl Fn(usize, &Path) -> Job + Send + Sync + 'static,
) -> Vec<Model> {
    let out_dir = out_dir.to_path_buf();
    let outcomes = ranks(n_ranks, move |ranks| {
        let folder = folder_of(&out_dir, ranks.rank());
        let job = make(ranks.rank(), &folder);
        let outcome = train::run_among(tiny_model(), &job, &ranks, &mut Silent);
        assert!(ranks.is_first() || !folder.exists());
        Ok(outcome?.0)
    });
    outcomes
        .into_iter()
        .map(|outcome| outcome.unwrap().unwrap())
        .collect()
}

fn assert_same_losses(got: &Path, expect: &Path) {
    let (got_lines, expect_lines) = (metrics(got), metrics(expect));
    assert_eq!(got_lines.len(), expect_lines.len());
    for (got, expect) in got_lines.iter().zip(&expect_lines) {
        for key in ["step", "tokens", "trained_tokens", "lr", "epoch"] {
            assert_eq!(got.get(key), expect.get(key));
        }
        for key in ["loss", "grad_norm", "train_probe_loss", "bits_per_byte"] {
            let number = |line: &serde_json::Value| line.get(key).and_then(|x| x.as_f64());
            if let (Some(got), Some(expect)) = (number(got), number(expect)) {
                let close = (got - expect).abs() <= LOSS_REL * expect.abs();
                assert!(close, "{key}: {got}, of one rank {expect}");
            }
        }
    }
}

fn assert_same_weights(got: &Model, expect: &Model) {
    for (got, expect) in got.trainable().iter().zip(expect.trainable()) {
        for (got, expect) in got.f32s().iter().zip(expect.f32s()) {
            assert!((got - expect).abs() <= WEIGHT_ABS, "{got} for {expect}");
        }
    }
}

/// Several ranks against one.
fn check(make: fn(&Path) -> Job) {
    let one = tempfile::tempdir().unwrap();
    let (model, _) = run_silently(&make(one.path()));
    assert_eq!(train_lines(one.path()).len(), 12);
    for n_ranks in [1, 2, 4] {
        let several = tempfile::tempdir().unwrap();
        let models = train_on(n_ranks, several.path(), make);
        assert_same_losses(several.path(), one.path());
        for of_rank in &models {
            assert_same_weights(of_rank, &model);
            assert_eq!(weight_bits(of_rank), weight_bits(&models[0]));
        }
        if n_ranks == 1 {
            assert_eq!(weight_bits(&models[0]), weight_bits(&model));
            assert_eq!(
                timeless_metrics(several.path()),
                timeless_metrics(one.path())
            );
        }
        let folder = if model.lora().is_some() {
            "adapter"
        } else {
            "model"
        };
        assert_eq!(
            listing(&several.path().join(folder)),
            listing(&one.path().join(folder))
        );
    }
}

#[test]
fn several_ranks_learn_what_one_learns() {
    check(long_job);
}

#[test]
fn several_ranks_train_an_adapter_as_one_does_dropout_and_all() {
    check(adapter_job);
}

/// Steps of two micro-batches of three rows, or of more with fewer rows.
fn wide_job(out_dir: &Path) -> Job {
    let mut job = long_job(out_dir);
    (job.batch.rows, job.batch.accumulate) = (3, 2);
    job
}

#[test]
fn ranks_with_room_for_fewer_rows_have_all_cut_the_step_alike() {
    let one = tempfile::tempdir().unwrap();
    let (model, summary) = run_silently(&wide_job(one.path()));
    assert_eq!(train_lines(one.path()).len(), 12);
    // With three ranks the two micro-batches would be too few; with one row at a time there are six.
    for n_ranks in [2, 3] {
        let several = tempfile::tempdir().unwrap();
        let models = train_unequal(n_ranks, several.path(), |rank, folder| {
            let mut job = wide_job(folder);
            job.rows_at_once = [None, Some(2), Some(1)][rank];
            job
        });
        assert_same_losses(several.path(), one.path());
        for of_rank in &models {
            assert_same_weights(of_rank, &model);
            assert_eq!(weight_bits(of_rank), weight_bits(&models[0]));
        }
    }
    assert!(summary.account.rows_per_epoch > 6);
}

#[test]
fn fewer_rows_at_a_time_are_the_same_steps_by_one_process_too() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (all, _) = run_silently(&wide_job(dirs[0].path()));
    let mut job = wide_job(dirs[1].path());
    job.rows_at_once = Some(2);
    let (fewer, _) = run_silently(&job);
    assert_same_losses(dirs[1].path(), dirs[0].path());
    assert_same_weights(&fewer, &all);
}

#[test]
fn two_runs_of_the_same_ranks_give_the_same_bytes() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [first, second] = dirs.each_ref().map(|dir| train_on(3, dir.path(), long_job));
    assert_eq!(weight_bits(&first[0]), weight_bits(&second[0]));
    let [first, second] = dirs.each_ref().map(|dir| timeless_metrics(dir.path()));
    assert_eq!(first, second);
}

/// Raises the flag after a step.
struct StopAfter(u64, Arc<AtomicBool>);

impl Progress for StopAfter {
    fn step(&mut self, report: &StepReport) {
        if report.line.step == self.0 {
            self.1.store(true, Ordering::Relaxed);
        }
    }
}

/// Trains seven steps on `n_ranks`, of which the last is asked to stop then.
fn interrupt_at_seven(n_ranks: usize, out_dir: &Path) {
    let dir = out_dir.to_path_buf();
    let outcomes = ranks(n_ranks, move |ranks| {
        let job = long_job(&folder_of(&dir, ranks.rank()));
        let is_last = ranks.rank() + 1 == ranks.n_ranks();
        let mut stop = StopAfter(if is_last { 7 } else { u64::MAX }, job.stop.clone());
        match train::run_among(tiny_model(), &job, &ranks, &mut stop) {
            Err(Error::Interrupted { step, .. }) => Ok(step),
            Err(error) => Err(error),
            Ok(_) => Ok(0),
        }
    });
    for outcome in outcomes {
        assert_eq!(outcome.unwrap().unwrap(), 7);
    }
    assert!(out_dir.join("checkpoints/step-7").is_dir());
}

#[test]
fn one_rank_asked_to_stop_stops_all_and_any_number_goes_on() {
    let one = tempfile::tempdir().unwrap();
    let (model, _) = run_silently(&long_job(one.path()));
    for (before, after) in [(2, 1), (1, 4), (4, 2)] {
        let dir = tempfile::tempdir().unwrap();
        interrupt_at_seven(before, dir.path());
        let models = match after {
            1 => vec![run_silently(&long_job(dir.path())).0],
            after => train_on(after, dir.path(), long_job),
        };
        assert_same_losses(dir.path(), one.path());
        assert_same_weights(&models[0], &model);
    }
}

#[test]
fn a_checkpoint_of_two_ranks_has_the_tensors_of_one() {
    let moments = |n_ranks: usize| {
        let dir = tempfile::tempdir().unwrap();
        interrupt_at_seven(n_ranks, dir.path());
        let file = dir.path().join("checkpoints/step-7/optimizer.safetensors");
        let bytes = std::fs::read(file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut moments: Vec<_> = tensors
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                let (values, _) = view.data().as_chunks();
                let values: Vec<f32> = values.iter().map(|x| f32::from_le_bytes(*x)).collect();
                (name, view.shape().to_vec(), values)
            })
            .collect();
        moments.sort_by(|a, b| a.0.cmp(&b.0));
        moments
    };
    let (one, two) = (moments(1), moments(2));
    assert_eq!(one.len(), two.len());
    for (one, two) in one.iter().zip(&two) {
        assert_eq!((&one.0, &one.1), (&two.0, &two.1));
        for (a, b) in one.2.iter().zip(&two.2) {
            assert!((a - b).abs() <= 1e-6, "{}: {a} and {b}", one.0);
        }
    }
}

/// Panics after a step, as a process that is killed.
struct DieAfter(u64);

impl Progress for DieAfter {
    fn step(&mut self, report: &StepReport) {
        assert!(report.line.step != self.0, "killed");
    }
}

#[test]
fn a_rank_that_dies_ends_all_others_with_its_number() {
    for doomed in [0, 1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_path_buf();
        let started = Instant::now();
        let outcomes = ranks(3, move |ranks| {
            let job = long_job(&folder_of(&path, ranks.rank()));
            let mut progress = DieAfter(if ranks.rank() == doomed { 3 } else { u64::MAX });
            train::run_among(tiny_model(), &job, &ranks, &mut progress).map(|_| ())
        });
        assert!(started.elapsed() < LIMITS.silence, "noticed at once");
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            match outcome {
                None => assert_eq!(rank, doomed),
                Some(Err(Error::Rank { rank: named, what })) => {
                    assert_eq!(named, doomed, "on rank {rank}: {what}");
                    assert!(what.contains("ended without a word"), "{what}");
                }
                Some(other) => panic!("rank {rank}: {other:?}"),
            }
        }
    }
}

#[test]
fn ranks_that_were_started_with_other_data_are_refused_by_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_path_buf();
    let outcomes = ranks(2, move |ranks| {
        let mut job = long_job(&folder_of(&path, ranks.rank()));
        if ranks.rank() == 1 {
            job.train.pop();
        }
        train::run_among(tiny_model(), &job, &ranks, &mut Silent).map(|_| ())
    });
    let texts: Vec<String> = outcomes
        .into_iter()
        .map(|outcome| outcome.unwrap().unwrap_err().to_string())
        .collect();
    assert!(texts[1].starts_with("training_data is "), "{}", texts[1]);
    assert!(texts[0].starts_with("rank 1 failed"), "{}", texts[0]);
    assert!(texts[0].contains("training_data"), "{}", texts[0]);
}

#[test]
fn a_loss_that_is_no_number_on_one_rank_is_an_error_on_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_path_buf();
    let outcomes = ranks(2, move |ranks| {
        let mut job = long_job(&folder_of(&path, ranks.rank()));
        job.optimizer.lr = 1e30;
        job.optimizer.warmup_ratio = 0.0;
        train::run_among(tiny_model(), &job, &ranks, &mut Silent).map(|_| ())
    });
    for outcome in outcomes {
        let error = outcome.unwrap().unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    }
}

#[test]
fn fewer_micro_batches_than_ranks_are_refused_with_what_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_path_buf();
    let outcomes = ranks(3, move |ranks| {
        let job = job(&folder_of(&path, ranks.rank()));
        train::run_among(tiny_model(), &job, &ranks, &mut Silent).map(|_| ())
    });
    let text = outcomes[1].as_ref().unwrap().as_ref().unwrap_err();
    assert!(
        text.to_string().contains("batch.accumulate = 3 or more"),
        "{text}"
    );
}

#[test]
fn a_rank_that_does_not_come_is_named_to_those_that_did() {
    let port = free_port();
    let limits = Limits {
        rendezvous: Duration::from_secs(2),
        ..LIMITS
    };
    let join = move |rank| Ranks::join(&place(rank, 4, port), limits, Device::Cpu);
    let threads: Vec<_> = [0, 2].map(|rank| thread::spawn(move || join(rank))).into();
    for thread in threads {
        let text = thread.join().unwrap().unwrap_err().to_string();
        assert!(
            text.contains("rank 1, 3 of 4 did not come within 2 s"),
            "{text}"
        );
    }
    let text = join(1).unwrap_err().to_string();
    assert!(text.contains("rank 0 was not there within 2 s"), "{text}");
}

#[test]
fn a_port_that_another_program_holds_is_passed_over_by_all() {
    // As the store of a launcher that listens on MASTER_PORT and answers in its own way, or not at all.
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = other.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in other.incoming() {
            let _ = stream
                .unwrap()
                .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let free = free_port();
    let threads: Vec<_> = (0..2)
        .map(|rank| {
            let place = Place {
                ports: vec![taken, free],
                ..place(rank, 2, 0)
            };
            thread::spawn(move || {
                let ranks = Ranks::join(&place, LIMITS, Device::Cpu)?;
                let mut sums = [1.0 + rank as f64, 0.5];
                ranks.sum(&mut sums)?;
                ranks.leave();
                Ok::<_, Error>(sums)
            })
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap().unwrap(), [3.0, 1.0]);
    }
}

#[test]
fn strangers_are_sent_away_with_the_reason() {
    let port = free_port();
    let first = thread::spawn(move || Ranks::join(&place(0, 2, port), LIMITS, Device::Cpu));
    // One that says nothing sensible does not keep the others from coming.
    thread::sleep(Duration::from_millis(300));
    let mut stranger = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let refused = |place: Place| {
        let outcome = Ranks::join(&place, LIMITS, Device::Cpu);
        outcome.unwrap_err().to_string()
    };
    let other_run = Place {
        run: "another recipe".to_owned(),
        ..place(1, 2, port)
    };
    let text = refused(other_run);
    assert!(
        text.contains("it runs another recipe, rank 0 a test"),
        "{text}"
    );
    let text = refused(place(2, 3, port));
    assert!(text.contains("it counts 3 ranks, rank 0 2"), "{text}");
    let second = Ranks::join(&place(1, 2, port), LIMITS, Device::Cpu).unwrap();
    let first = first.join().unwrap().unwrap();
    second.leave();
    first.leave();
}

#[test]
fn a_rank_that_falls_silent_is_given_up() {
    let port = free_port();
    let limits = Limits {
        silence: Duration::from_secs(1),
        ..LIMITS
    };
    let first = thread::spawn(move || {
        let ranks = Ranks::join(&place(0, 2, port), limits, Device::Cpu)?;
        ranks.any(false)
    });
    // It greets as rank 1 of 2 does and then hangs, its connection open.
    let mut hung = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    };
    let mut greeting = b"cyrene ranks 1\n".to_vec();
    for number in [1u32, 2, 6] {
        greeting.extend_from_slice(&number.to_le_bytes());
    }
    greeting.extend_from_slice(b"a test");
    hung.write_all(&greeting).unwrap();
    let text = first.join().unwrap().unwrap_err().to_string();
    assert!(text.starts_with("rank 1 failed"), "{text}");
    assert!(text.contains("nothing was heard of it any more"), "{text}");
}
