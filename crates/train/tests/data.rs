//! Which documents a run sees, in which rows and steps, and that no label is lost on the way.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::{VOCAB, document, job, labelled};
use text::Example;
use text::pack::Packing;
use train::data::Plan;
use train::{Error, Job};

/// A job on these documents, one row a step.
fn job_on(documents: Vec<Example>) -> Job {
    let mut job = job(Path::new("unused"));
    job.train = documents;
    job.batch.accumulate = 1;
    job.run.epochs = 1;
    job
}

fn plan(job: &Job) -> Plan {
    Plan::new(job, VOCAB).unwrap()
}

/// How often each document is seen in the steps of one epoch.
fn times_seen(job: &Job, plan: &Plan, epoch_idx: usize) -> Vec<usize> {
    let mut seen = vec![0; job.train.len()];
    for step_idx in 0..plan.total_steps() {
        let step = plan.step(step_idx);
        if step.epoch_idx == epoch_idx {
            for row in plan.micro_batches(step) {
                row.examples
                    .iter()
                    .for_each(|document| seen[*document] += 1);
            }
        }
    }
    seen
}

/// The tokens of all steps, in order.
fn tokens(plan: &Plan) -> Vec<u32> {
    (0..plan.total_steps())
        .flat_map(|step_idx| plan.micro_batches(plan.step(step_idx)))
        .flat_map(|row| row.tokens_t)
        .collect()
}

#[test]
fn whole_weights_repeat_a_source() {
    let mut job = job_on((0..6).map(|i| document(i, 10, "en")).collect());
    for (document, source) in job.train.iter_mut().zip([0, 0, 1, 1, 2, 3]) {
        document.origin.source_idx = source;
    }
    // The fourth source has no weight of its own: 1.
    job.source_weights = vec![3.0, 1.0, 0.0];
    assert_eq!(times_seen(&job, &plan(&job), 0), [3, 3, 1, 1, 0, 1]);
}

#[test]
fn fractional_weights_draw_anew_each_epoch() {
    let mut job = job_on((0..40).map(|i| document(i, 10, "en")).collect());
    job.source_weights = vec![1.25];
    job.run.epochs = 2;
    let plan = plan(&job);
    let first = times_seen(&job, &plan, 0);
    let second = times_seen(&job, &plan, 1);
    for seen in [&first, &second] {
        assert_eq!(seen.iter().sum::<usize>(), 50);
        assert!(seen.iter().all(|times| (1..=2).contains(times)));
    }
    assert_ne!(first, second);
}

#[test]
fn splitting_keeps_every_label() {
    let mut job = job_on(vec![
        document(1, 100, "en"),
        document(2, 23, "en"),
        document(3, 24, "en"),
        document(4, 25, "en"),
    ]);
    // A few labels without loss, so that counts could go wrong.
    for position in [7, 23, 24, 50] {
        job.train[0].labels[position] = -100;
    }
    let plan = plan(&job);
    let account = plan.account();
    let labels: u64 = job.train.iter().map(|d| d.n_targets()).sum();
    assert_eq!(account.labels, labels);
    assert_eq!(account.trained_labels_per_epoch, labels);
    assert_eq!(account.documents_split, 2);
    for step_idx in 0..plan.total_steps() {
        for row in plan.micro_batches(plan.step(step_idx)) {
            assert!(row.tokens_t.len() <= job.data.row_tokens);
        }
    }
}

#[test]
fn split_documents_predict_what_they_would_whole() {
    let job = job_on(vec![document(1, 60, "en")]);
    let ids = &job.train[0].input_ids;
    let mut expect: Vec<(u32, u32)> = ids.windows(2).map(|pair| (pair[0], pair[1])).collect();
    let plan = plan(&job);
    let mut got: Vec<(u32, u32)> = (0..plan.total_steps())
        .flat_map(|step_idx| plan.micro_batches(plan.step(step_idx)))
        .flat_map(|row| row.tokens_t.into_iter().zip(row.targets_t))
        .filter(|(_, target)| *target >= 0)
        .map(|(token, target)| (token, target as u32))
        .collect();
    expect.sort_unstable();
    got.sort_unstable();
    assert_eq!(got, expect);
}

fn is_trained(job: &Job) -> Vec<bool> {
    let plan = plan(job);
    plan.is_trained(plan.total_steps())
}

#[test]
fn trained_documents_are_those_of_which_the_steps_saw_every_label() {
    // Each a row of its own.
    let mut job = job_on((0..6).map(|i| document(i, 20, "en")).collect());
    job.train[1].labels.fill(-100);
    job.train[2].origin.source_idx = 1;
    job.source_weights = vec![1.0, 0.0];
    assert_eq!(is_trained(&job), [true, false, false, true, true, true]);
    // What comes behind the last step is not trained on.
    job.run.steps = Some(2);
    let short = plan(&job);
    let seen: Vec<bool> = times_seen(&job, &short, 0)
        .iter()
        .map(|times| *times > 0)
        .collect();
    assert_eq!(short.is_trained(2), seen);
    assert_eq!(seen.iter().filter(|is_seen| **is_seen).count(), 2);
    // Nor is a document of which a part comes behind it.
    let long = plan(&job_on(vec![document(1, 60, "en")]));
    assert_eq!(long.is_trained(long.total_steps()), [true]);
    assert_eq!(long.is_trained(1), [false]);
}

#[test]
fn last_batch_is_a_step_of_its_own() {
    let mut job = job_on((0..7).map(|i| document(i, 20, "en")).collect());
    job.batch.rows = 2;
    job.batch.accumulate = 2;
    let plan = plan(&job);
    let rows: Vec<usize> = (0..plan.total_steps())
        .map(|step_idx| plan.step(step_idx).rows.len())
        .collect();
    assert_eq!(rows, [4, 3]);
    let last: Vec<_> = plan.micro_batches(plan.step(1)).collect();
    assert_eq!(last.len(), 2);
    assert_eq!(last[0].cu_seqlens, [0, 20, 40]);
    assert_eq!(last[1].cu_seqlens, [0, 20]);
    assert_eq!(plan.step(1).n_targets, 3 * 19);
    assert_eq!(plan.epoch_after(plan.step(0)), 0.571429);
    assert_eq!(plan.epoch_after(plan.step(1)), 1.0);
}

#[test]
fn steps_override_epochs() {
    let mut job = job_on((0..4).map(|i| document(i, 20, "en")).collect());
    for (steps, epochs) in [(3, 1), (10, 3)] {
        job.run.steps = Some(steps);
        let plan = plan(&job);
        assert_eq!(plan.total_steps(), steps);
        assert_eq!(plan.step(steps - 1).epoch_idx + 1, epochs);
    }
}

#[test]
fn order_follows_the_seed_alone() {
    for packing in [Packing::BinPack, Packing::Sequential] {
        let mut job = job_on(
            (0..30)
                .map(|i| document(i, 5 + i as usize % 9, "en"))
                .collect(),
        );
        job.data.packing = packing;
        job.run.epochs = 2;
        let first = tokens(&plan(&job));
        assert_eq!(first, tokens(&plan(&job)));
        // Another order in the second epoch, and with another seed.
        assert_ne!(first[..first.len() / 2], first[first.len() / 2..]);
        job.seed += 1;
        assert_ne!(first, tokens(&plan(&job)));
    }
}

#[test]
fn repeats_come_in_other_orders_spread_over_the_epoch() {
    let mut job = job_on((0..40).map(|i| document(i, 20, "en")).collect());
    job.source_weights = vec![3.0];
    for packing in [Packing::BinPack, Packing::Sequential] {
        job.data.packing = packing;
        let seen: Vec<usize> = {
            let plan = plan(&job);
            (0..plan.total_steps())
                .flat_map(|step_idx| plan.micro_batches(plan.step(step_idx)).collect::<Vec<_>>())
                .flat_map(|row| row.examples)
                .collect()
        };
        assert_eq!(seen.len(), 120);
        // The order in which documents come the first, the second and the third time.
        let mut passes: Vec<Vec<usize>> = vec![Vec::new(); 3];
        let mut times = vec![0; 40];
        for document in &seen {
            passes[times[*document]].push(*document);
            times[*document] += 1;
        }
        assert_eq!(times, [3; 40]);
        assert_ne!(passes[0], passes[1]);
        assert_ne!(passes[1], passes[2]);
        // Mixed over the epoch, not one document three times and then the next.
        let in_a_row = seen.windows(2).filter(|pair| pair[0] == pair[1]).count();
        assert!(in_a_row < 12, "{in_a_row}");
    }
}

#[test]
fn documents_without_a_label_are_left_out_and_counted() {
    let mut job = job_on((0..3).map(|i| document(i, 10, "en")).collect());
    job.train[1].labels.fill(-100);
    let plan = plan(&job);
    assert_eq!(times_seen(&job, &plan, 0), [1, 0, 1]);
    assert_eq!(plan.account().documents_without_label, 1);
    assert_eq!(plan.account().trained_labels, 18);
}

#[test]
fn a_label_on_the_first_token_trains_nothing() {
    let mut job = job_on(vec![labelled(vec![1, 2, 3], "en")]);
    job.train[0].labels = vec![1, -100, 3];
    assert_eq!(plan(&job).account().trained_labels, 1);
}

#[test]
fn no_trainable_token_is_an_error() {
    let mut job = job_on(vec![document(1, 10, "en"), document(2, 10, "en")]);
    job.train.iter_mut().for_each(|d| d.labels.fill(-100));
    let error = Plan::new(&job, VOCAB).unwrap_err();
    assert!(
        matches!(error, Error::NoTrainableToken { documents: 2 }),
        "{error}"
    );
}

#[test]
fn a_token_beyond_the_vocabulary_is_named() {
    let mut job = job_on(vec![document(1, 10, "en"), document(2, 10, "en")]);
    job.train[1].input_ids[4] = 96;
    let error = Plan::new(&job, VOCAB).unwrap_err().to_string();
    for part in [
        "document 1",
        "training",
        "token id 96",
        "position 4",
        "has 96",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn unequal_ids_and_labels_are_named() {
    let mut job = job_on(vec![document(1, 10, "en")]);
    job.train[0].labels.pop();
    let error = Plan::new(&job, VOCAB).unwrap_err().to_string();
    assert!(error.contains("10 ids and 9 labels"), "{error}");
}
