//! Whole runs of a tiny model: that it learns, what is written, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;

use common::{
    VOCAB, document, job, labelled, listing, metrics, run_silently, tiny_model, train_lines,
    weight_bits,
};
use kernel::{DType, Device};
use model::{Model, Saved};
use text::Example;
use train::job::{LoraTuner, ResultKind};
use train::metrics::{AlertLine, ValidationLine};
use train::{Error, Silent, TunerConfig, ValidationSet};

fn lora() -> TunerConfig {
    TunerConfig::Lora(LoraTuner {
        rank: 4,
        alpha: 8.0,
        ..LoraTuner::default()
    })
}

fn validation_lines(job: &train::Job) -> Vec<ValidationLine> {
    metrics(&job.out_dir)
        .into_iter()
        .filter(|line| line.get("split").is_some())
        .map(|line| serde_json::from_value(line).unwrap())
        .collect()
}

/// Nats a target of each document on its own.
fn nll_of(model: &Model, document: &Example) -> f64 {
    let ids = &document.input_ids;
    let mut targets_t: Vec<i32> = document.labels[1..].to_vec();
    targets_t.push(-1);
    targets_t
        .iter_mut()
        .for_each(|target| *target = (*target).max(-1));
    let batch = model::Batch {
        tokens_t: ids,
        targets_t: &targets_t,
        cu_seqlens: &[0, ids.len() as u32],
    };
    let nll_t = model.nll(&mut Saved::default(), &batch).unwrap();
    nll_t.iter().map(|nll| f64::from(*nll)).sum()
}

#[test]
fn loss_falls_on_a_repeated_text() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.train = vec![document(5, 24, "en"); 4];
    job.validation.clear();
    job.optimizer.lr = 1e-2;
    job.run.epochs = 20;
    let (_, summary) = run_silently(&job);
    let lines = train_lines(dir.path());
    assert_eq!(lines.len(), 40);
    assert!(lines[0].loss > 4.0, "{}", lines[0].loss);
    assert!(lines[39].loss < 0.5 * lines[0].loss, "{}", lines[39].loss);
    assert_eq!(summary.train.as_ref(), lines.last());
}

/// Needs a GPU: see `Device::for_tests`.
#[test]
fn fifty_steps_on_a_gpu_stay_with_those_on_a_cpu() {
    let device = Device::for_tests();
    if device == Device::Cpu {
        println!("skipped: CYRENE_TEST_DEVICE names no GPU");
        return;
    }
    let losses = [Device::Cpu, device].map(|device| {
        let dir = tempfile::tempdir().unwrap();
        let mut job = job(dir.path());
        job.optimizer.lr = 1e-3;
        job.run.epochs = 10;
        let model = tiny_model().to_device(device).unwrap();
        train::run(model, &job, &mut Silent).unwrap();
        let losses: Vec<f64> = train_lines(dir.path()).iter().map(|l| l.loss).collect();
        assert_eq!(losses.len(), 50);
        losses
    });
    let apart = losses[0].iter().zip(&losses[1]).map(|(a, b)| (a - b).abs());
    let apart = apart.fold(0.0, f64::max);
    println!(
        "at most {apart:.1e} nats apart, from {:.3} to {:.3}",
        losses[0][0], losses[0][49]
    );
    assert!(apart < 1e-3, "{losses:?}");
}

#[test]
fn same_seed_gives_the_same_bytes() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let bits = dirs
        .each_ref()
        .map(|dir| weight_bits(&run_silently(&job(dir.path())).0));
    assert_eq!(bits[0], bits[1]);
    let [a, b] = dirs.each_ref().map(|dir| dir.path().join("model"));
    assert_eq!(listing(&a), listing(&b));
    for name in listing(&a) {
        assert_eq!(
            fs::read(a.join(&name)).unwrap(),
            fs::read(b.join(&name)).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn loss_of_a_step_is_a_mean_over_all_micro_batches() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.batch.accumulate = 100;
    // Documents with few and with many labels, so that a mean of means would show.
    job.train[0].labels[..8].fill(-100);
    job.run.epochs = 1;
    job.validation.clear();
    let model = tiny_model();
    let nll: f64 = job
        .train
        .iter()
        .map(|document| nll_of(&model, document))
        .sum();
    run_silently(&job);
    let lines = train_lines(dir.path());
    assert_eq!(lines.len(), 1);
    let labels = lines[0].trained_tokens as f64;
    // Packed against alone: sums of f32 in another order.
    assert!((lines[0].loss / (nll / labels) - 1.0).abs() < 1e-5);
    assert_eq!(lines[0].lr, 0.0);
}

#[test]
fn training_lines_say_where_the_run_is() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path());
    let (_, summary) = run_silently(&job);
    let lines = train_lines(dir.path());
    let steps: Vec<u64> = lines.iter().map(|line| line.step).collect();
    assert_eq!(steps, (1..=summary.steps).collect::<Vec<_>>());
    assert!(lines.windows(2).all(|pair| pair[0].epoch < pair[1].epoch));
    assert_eq!(lines.last().unwrap().epoch, 2.0);
    assert_eq!(
        lines.iter().map(|line| line.tokens).sum::<u64>(),
        summary.account.tokens
    );
    assert!(
        lines
            .iter()
            .all(|line| line.tokens_per_s > 0.0 && line.grad_norm > 0.0)
    );
}

#[test]
fn held_out_loss_is_measured_by_language() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path());
    run_silently(&job);
    let lines = validation_lines(&job);
    let languages: Vec<&str> = lines[..3]
        .iter()
        .map(|line| line.language.as_str())
        .collect();
    assert_eq!(languages, ["all", "chs", "en"]);
    // The untrained model, document by document.
    let model = tiny_model();
    for line in &lines[..3] {
        assert_eq!(line.step, 0);
        let of_language = |documents: &'_ [Example]| -> Vec<Example> {
            let kept = documents.iter().filter(|document| {
                line.language == "all"
                    || document.origin.language.as_deref() == Some(&line.language)
            });
            kept.cloned().collect()
        };
        let documents = of_language(&job.validation[0].examples);
        let nll: f64 = documents
            .iter()
            .map(|document| nll_of(&model, document))
            .sum();
        let targets: usize = documents.iter().map(|d| d.labels.len() - 1).sum();
        let bytes: usize = documents.iter().map(|document| document.origin.bytes).sum();
        assert!((line.loss / (nll / targets as f64) - 1.0).abs() < 1e-5);
        let bits = nll / std::f64::consts::LN_2 / bytes as f64;
        assert!((line.bits_per_byte.unwrap() / bits - 1.0).abs() < 1e-5);
        let probe = line.train_probe_loss.unwrap();
        assert!((line.gap.unwrap() - (line.loss / probe - 1.0)).abs() < 1e-12);
    }
    let steps: Vec<u64> = lines.iter().step_by(3).map(|line| line.step).collect();
    assert_eq!(steps, [0, 4, 8, 10]);
}

#[test]
fn probe_is_matched_to_the_held_out_documents() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    // The only training documents that match are at the end, and one source is not trained on.
    job.train = [(9, "en"), (20, "en"), (12, "chs"), (20, "en"), (12, "en")]
        .into_iter()
        .zip(0..)
        .map(|((n_tokens, language), seed)| document(seed, n_tokens, language))
        .collect();
    job.train[1].origin.source_idx = 1;
    job.source_weights = vec![1.0, 0.0];
    job.validation[0].examples = vec![document(70, 20, "en"), document(71, 11, "en")];
    job.run.epochs = 1;
    let model = tiny_model();
    let nll: f64 = job.train[3..]
        .iter()
        .map(|document| nll_of(&model, document))
        .sum();
    run_silently(&job);
    let probe = validation_lines(&job)[0].train_probe_loss.unwrap();
    assert!((probe / (nll / 30.0) - 1.0).abs() < 1e-5);
}

#[test]
fn every_side_is_measured_apart_and_the_first_decides() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.run.steps = Some(1);
    run_silently(&job);
    let alone = validation_lines(&job);
    let dir = tempfile::tempdir().unwrap();
    job.out_dir = dir.path().to_path_buf();
    let strict = vec![document(50, 20, "en"), document(51, 9, "chs")];
    let nll: f64 = strict.iter().map(|d| nll_of(&tiny_model(), d)).sum();
    for (name, documents) in [("val-strict", strict), ("probe-x", Vec::new())] {
        job.validation.push(ValidationSet {
            name: name.to_string(),
            examples: documents,
        });
    }
    let (_, summary) = run_silently(&job);
    let lines = validation_lines(&job);
    let names: Vec<_> = lines[..6]
        .iter()
        .map(|line| (line.split.as_str(), line.language.as_str()))
        .collect();
    assert_eq!(
        names,
        [
            ("val", "all"),
            ("val", "chs"),
            ("val", "en"),
            ("val-strict", "all"),
            ("val-strict", "chs"),
            ("val-strict", "en")
        ],
        "a side without documents has no lines"
    );
    assert_eq!(lines[..3], alone[..3], "and changes nothing in the others");
    assert!((lines[3].loss / (nll / 27.0) - 1.0).abs() < 1e-5);
    assert_eq!((lines[3].train_probe_loss, lines[3].gap), (None, None));
    assert_eq!(summary.best.unwrap().loss, lines[6].loss);
    assert_eq!(lines[6].split, "val");
}

#[test]
fn unknown_bytes_leave_bits_per_byte_open() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.validation[0].examples[0].origin.bytes = 0;
    job.run.steps = Some(1);
    run_silently(&job);
    let lines = validation_lines(&job);
    assert_eq!(lines[0].bits_per_byte, None);
    assert_eq!(lines[1].bits_per_byte, None);
    assert!(lines[2].bits_per_byte.is_some());
}

#[test]
fn a_wide_gap_raises_an_alert() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.optimizer.lr = 1e-2;
    job.run.epochs = 12;
    job.run.validate_every = 0;
    run_silently(&job);
    let alerts: Vec<AlertLine> = metrics(dir.path())
        .into_iter()
        .filter(|line| line.get("alert").is_some())
        .map(|line| serde_json::from_value(line).unwrap())
        .collect();
    // None for the untrained model, one at the end, when the training documents are known by heart and the held-out ones are noise.
    assert_eq!(alerts.len(), 1);
    assert_eq!(
        (alerts[0].alert.as_str(), alerts[0].level.as_str()),
        ("gap", "warn")
    );
    assert!(
        alerts[0].text.contains("held-out loss is"),
        "{}",
        alerts[0].text
    );
}

#[test]
fn result_loads_as_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let (model, summary) = run_silently(&job(dir.path()));
    assert_eq!(summary.result, dir.path().join("model"));
    let loaded = Model::load(&summary.result, DType::F32).unwrap();
    assert_eq!(weight_bits(&loaded), weight_bits(&model));
    assert_ne!(weight_bits(&loaded), weight_bits(&tiny_model()));
}

#[test]
fn best_result_is_the_checkpoint_with_the_lowest_held_out_loss() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.optimizer.lr = 1e-2;
    job.run.epochs = 12;
    job.run.validate_every = 2;
    job.run.result = ResultKind::Best;
    let (model, summary) = run_silently(&job);
    let best = summary.best.unwrap();
    assert!(
        best.step < summary.steps,
        "noise is learned by heart, so the best comes early"
    );
    let folder = dir.path().join(format!("checkpoints/step-{}", best.step));
    let checkpoint = Model::load(&folder.join("model"), DType::F32).unwrap();
    assert_eq!(weight_bits(&model), weight_bits(&checkpoint));
    let result = Model::load(&summary.result, DType::F32).unwrap();
    assert_eq!(weight_bits(&result), weight_bits(&checkpoint));
}

#[test]
fn best_result_needs_held_out_data() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.run.result = ResultKind::Best;
    job.validation.clear();
    let error = train::run(tiny_model(), &job, &mut Silent).unwrap_err();
    assert!(
        matches!(
            error,
            Error::BadValue {
                key: "run.result",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn lora_trains_only_the_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.tuner = lora();
    let (mut model, summary) = run_silently(&job);
    assert_eq!(summary.result, dir.path().join("adapter"));
    assert!(!dir.path().join("model").exists());
    assert_eq!(
        listing(&summary.result),
        ["adapter_config.json", "adapter_model.safetensors"]
    );
    assert!(
        model
            .trainable_names()
            .iter()
            .all(|name| name.contains(".lora_"))
    );
    // Without the adapter the base is bit for bit what it was, and with it the adapter's folder says the same as the model in memory.
    let trained = weight_bits(&model);
    let mut base = tiny_model();
    base.load_adapter(&summary.result).unwrap();
    assert_eq!(weight_bits(&base), trained);
    model.merge_lora().unwrap();
    base.merge_lora().unwrap();
    assert_eq!(weight_bits(&base), weight_bits(&model));
}

#[test]
fn a_model_with_an_adapter_goes_on_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.tuner = lora();
    let (model, _) = run_silently(&job);
    let before = weight_bits(&model);
    job.out_dir = dir.path().join("again");
    job.optimizer.lr = 0.0;
    job.optimizer.min_lr = 0.0;
    let (model, _) = train::run(model, &job, &mut Silent).unwrap();
    assert_eq!(weight_bits(&model), before);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.optimizer.lr = 1e30;
    job.optimizer.warmup_steps = Some(2);
    job.run.save_every = 1;
    let error = train::run(tiny_model(), &job, &mut Silent).unwrap_err();
    let Error::NotFinite {
        step,
        last_checkpoint,
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(*step, 3);
    assert_eq!(
        last_checkpoint.as_ref().unwrap(),
        &dir.path().join("checkpoints/step-2")
    );
    assert!(error.to_string().contains("step-2"), "{error}");
    assert!(!dir.path().join("model").exists());
    assert_eq!(train_lines(dir.path()).len(), 2);
}

#[test]
fn weights_that_are_no_numbers_are_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.optimizer.lr = 1e30;
    job.optimizer.weight_decay = 1000.0;
    job.optimizer.warmup_ratio = 0.0;
    job.run.save_every = 1;
    let mut model = tiny_model();
    let names = model.trainable_names();
    let is_wanted = |name: &String| name.ends_with("mlp.down_proj.weight");
    let at = names.iter().position(is_wanted).unwrap();
    // The first step takes it beyond what f32 holds; its loss and gradient are numbers still.
    model.trainable_mut()[at].f32s_mut()[0] = 1e6;
    let error = train::run(model, &job, &mut Silent).unwrap_err();
    assert!(
        matches!(error, Error::WeightsNotFinite { step: 1, .. }),
        "{error}"
    );
    let error = error.to_string();
    assert!(error.contains("mlp.down_proj.weight"), "{error}");
    assert!(error.contains("There is no checkpoint yet"), "{error}");
    assert!(!dir.path().join("checkpoints/step-1").exists());
    assert!(!dir.path().join("model").exists());
}

#[test]
fn newest_checkpoint_of_numbers_is_found() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(train::last_finite(dir.path()), None);
    let mut job = job(dir.path());
    job.run.save_every = 1;
    job.run.steps = Some(3);
    job.run.keep_last = 0;
    run_silently(&job);
    let folder = |step: u32| dir.path().join(format!("checkpoints/step-{step}"));
    assert_eq!(train::last_finite(dir.path()), Some(folder(3)));
    let mut model = Model::load(&folder(3).join("model"), DType::F32).unwrap();
    model.trainable_mut()[0].f32s_mut()[0] = f32::NAN;
    model.save(&folder(3).join("model"), None).unwrap();
    assert_eq!(train::last_finite(dir.path()), Some(folder(2)));
}

#[test]
fn weights_that_a_killed_save_left_beside_their_place_go_with_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    for left in [".model.tmp", ".model.4711.tmp", ".model.2.tmp"] {
        std::fs::create_dir_all(dir.path().join(left)).unwrap();
        std::fs::write(dir.path().join(left).join("model.safetensors"), "half").unwrap();
    }
    let mut job = job(dir.path());
    job.tuner = lora();
    run_silently(&job);
    let left: Vec<String> = listing(dir.path())
        .into_iter()
        .filter(|name| name.contains(".tmp"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn checkpoints_keep_the_newest_and_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.run.save_every = 1;
    job.run.validate_every = 2;
    job.optimizer.lr = 1e-2;
    let (_, summary) = run_silently(&job);
    let checkpoints = dir.path().join("checkpoints");
    let best = format!("step-{}", summary.best.unwrap().step);
    let last = format!("step-{}", summary.steps);
    let before_last = format!("step-{}", summary.steps - 1);
    let mut expect = vec![
        "best".to_string(),
        "last".to_string(),
        before_last,
        last.clone(),
    ];
    if !expect.contains(&best) {
        expect.push(best.clone());
    }
    expect.sort();
    assert_eq!(listing(&checkpoints), expect);
    let pointed = |name: &str| fs::read_to_string(checkpoints.join(name)).unwrap();
    assert_eq!(pointed("best").trim(), best);
    assert_eq!(pointed("last").trim(), last);
    assert_eq!(
        listing(&checkpoints.join(last)),
        ["SHA256SUMS", "model", "optimizer.safetensors", "state.json"]
    );
}

#[test]
fn a_checkpoint_that_cannot_be_written_harms_no_other() {
    /// Puts a file where the folder of step 3 should go.
    struct Obstructor(std::path::PathBuf);
    impl train::Progress for Obstructor {
        fn step(&mut self, report: &train::StepReport) {
            if report.line.step == 3 {
                fs::write(self.0.join("step-3"), "").unwrap();
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.run.save_every = 1;
    job.validation.clear();
    let checkpoints = dir.path().join("checkpoints");
    let obstructed = train::run(tiny_model(), &job, &mut Obstructor(checkpoints.clone()));
    let error = obstructed.unwrap_err();
    assert!(matches!(error, Error::Files(_)), "{error}");
    assert_eq!(
        listing(&checkpoints),
        ["last", "step-1", "step-2", "step-3"]
    );
    fs::remove_file(checkpoints.join("step-3")).unwrap();
    assert_eq!(run_silently(&job).1.steps, 10);
    assert_eq!(train_lines(dir.path()).len(), 10);
}

#[test]
fn an_adapter_of_another_rank_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.tuner = lora();
    let mut model = tiny_model();
    let config = model::LoraConfig {
        rank: 2,
        alpha: 8.0,
        dropout: 0.0,
        targets: Vec::new(),
    };
    model.attach_lora(&config, 1).unwrap();
    let error = train::run(model, &job, &mut Silent).unwrap_err();
    assert!(error.to_string().contains("`tuner.rank` is 4"), "{error}");
}

#[test]
fn another_recipe_is_refused_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.run.steps = Some(3);
    run_silently(&job);
    job.optimizer.lr = 5e-3;
    job.train[0].input_ids[1] ^= 1;
    job.run.keep_last = 5;
    let error = train::run(tiny_model(), &job, &mut Silent).unwrap_err();
    let Error::RecipeChanged { differences, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(differences.len(), 2);
    assert_eq!(differences[0], "optimizer.lr: was 0.002, is 0.005");
    assert!(differences[1].starts_with("training_data: was "));
    job.force = true;
    job.run.steps = Some(5);
    let (_, summary) = train::run(tiny_model(), &job, &mut Silent).unwrap();
    assert_eq!(summary.steps, 5);
    assert_eq!(train_lines(dir.path()).len(), 5);
}

#[test]
fn values_out_of_range_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.optimizer.betas = [0.9, 1.0];
    let error = train::run(tiny_model(), &job, &mut Silent)
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "`optimizer.betas` is 1, but must be at least 0 and below 1"
    );
    job.optimizer.betas = [0.9, 0.95];
    for minutes in [1e-320, -1.0, f64::INFINITY] {
        job.run.save_every_minutes = minutes;
        let error = train::run(tiny_model(), &job, &mut Silent).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("`run.save_every_minutes`"), "{error}");
        assert!(error.contains("to 1000000"), "{error}");
    }
    job.run.save_every_minutes = 0.0;
    for weight in [1e6, -1.0, f64::NAN] {
        job.source_weights = vec![1.0, weight];
        let error = train::run(tiny_model(), &job, &mut Silent).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("`data.sources.weight`"), "{error}");
        assert!(error.contains("from 0 to 1000"), "{error}");
    }
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = train::run(tiny_model(), &job(&file.join("run")), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn held_out_ids_are_checked_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.validation[0]
        .examples
        .push(labelled(vec![1, VOCAB as u32 + 3], "en"));
    let error = train::run(tiny_model(), &job, &mut Silent)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("held-out") && error.contains("id 99"),
        "{error}"
    );
}
