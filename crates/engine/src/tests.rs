//! The engine as a whole, driven through its handle with a toy model.

use std::time::Duration;

use crate::handle::start;
use crate::toy::{Call, FAILS, PANICS, Toy, VOCAB, logits};
use crate::{
    EngineConfig, EngineHandle, Error, Event, EventReceiver, FinishReason, Request, Sampling,
};

const PATIENCE: Duration = Duration::from_secs(20);

fn request(ids: &[u32], max_tokens: usize) -> Request {
    Request {
        ids: ids.to_vec(),
        max_tokens,
        sampling: Sampling {
            seed: Some(5),
            ..Sampling::default()
        },
        ..Request::default()
    }
}

/// All events of a request, as tokens and the last event.
fn collect(receiver: EventReceiver) -> (Vec<u32>, Event) {
    let mut ids = Vec::new();
    loop {
        match receiver.recv_timeout(PATIENCE).expect("an event in time") {
            Event::Token { id, .. } => ids.push(id),
            last => return (ids, last),
        }
    }
}

fn generate(engine: &EngineHandle, request: Request) -> Vec<u32> {
    collect(engine.submit(request).unwrap()).0
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..4000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{what} did not happen");
}

#[test]
fn greedy_follows_the_best_logit() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let mut greedy = request(&[1, 2], 6);
    greedy.sampling = Sampling::greedy();
    let (ids, last) = collect(engine.submit(greedy).unwrap());

    let mut seen = vec![1, 2];
    for id in &ids {
        let row = logits(&seen);
        assert!(row.iter().all(|logit| *logit <= row[*id as usize]));
        seen.push(*id);
    }
    assert_eq!(ids.len(), 6);
    let Event::Finished { reason, usage, .. } = last else {
        panic!("{last:?}");
    };
    assert_eq!(reason, FinishReason::Length);
    assert_eq!((usage.n_prompt, usage.n_generated), (2, 6));
}

#[test]
fn a_few_candidates_give_the_tokens_that_whole_rows_give() {
    let brief = Toy {
        is_brief: true,
        ..Toy::default()
    };
    let [whole, brief] =
        [Toy::default(), brief].map(|toy| start(toy, EngineConfig::default()).unwrap());
    // Greedy; filters that few candidates satisfy; filters that need the whole row.
    for (temperature, top_k) in [(0.0, 0), (0.8, 3), (1.0, 0), (1.0, 20)] {
        let mut asked = request(&[4, 7], 40);
        asked.top_logprobs = 3;
        asked.sampling.temperature = temperature;
        asked.sampling.top_k = top_k;
        asked.sampling.presence_penalty = 0.3;
        let tokens = |engine: &EngineHandle| {
            let events = engine.submit(asked.clone()).unwrap();
            let tokens = events.filter_map(|event| match event {
                Event::Token { id, logprob, top } => Some((id, logprob, top)),
                _ => None,
            });
            tokens.collect::<Vec<_>>()
        };
        let (want, got) = (tokens(&whole), tokens(&brief));
        assert_eq!(want.len(), 40);
        for ((want, logprob, top), (id, its_logprob, its_top)) in want.iter().zip(&got) {
            assert_eq!(id, want);
            assert!((logprob - its_logprob).abs() < 1e-5);
            let ids = |top: &[(u32, f32)]| top.iter().map(|(id, _)| *id).collect::<Vec<_>>();
            assert_eq!(ids(top), ids(its_top));
        }
    }
}

#[test]
fn stop_token_is_counted_but_not_sent() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let free = generate(&engine, request(&[1, 2], 8));
    let mut stopped = request(&[1, 2], 8);
    stopped.stop_ids = vec![free[3]];
    let (ids, last) = collect(engine.submit(stopped).unwrap());
    let first = free.iter().position(|id| *id == free[3]).unwrap();
    assert_eq!(ids, free[..first]);
    let Event::Finished {
        reason,
        stop,
        usage,
        ..
    } = last
    else {
        panic!("{last:?}");
    };
    let stop_id = stop.map(|scored| scored.id);
    assert_eq!((reason, stop_id), (FinishReason::Stop, Some(free[3])));
    assert_eq!(usage.n_generated, first + 1);
}

#[test]
fn seed_gives_the_same_tokens_whatever_else_runs() {
    let config = EngineConfig {
        max_snapshots: 0,
        prefill_chunk: 3,
        ..EngineConfig::default()
    };
    let engine = start(Toy::default(), config).unwrap();
    let prompt: Vec<u32> = (0..10).collect();
    let alone = generate(&engine, request(&prompt, 40));
    let others: Vec<EventReceiver> = (0..5)
        .map(|n| {
            let mut other = request(&[n, n + 1], 60);
            other.sampling.seed = Some(u64::from(n));
            engine.submit(other).unwrap()
        })
        .collect();
    let beside = generate(&engine, request(&prompt, 40));
    assert_eq!(alone, beside);
    for other in others {
        assert_eq!(collect(other).0.len(), 60);
    }
    let mut reseeded = request(&prompt, 40);
    reseeded.sampling.seed = Some(6);
    assert_ne!(alone, generate(&engine, reseeded));
}

#[test]
fn fresh_seed_is_reported_and_repeats_the_reply() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let mut unseeded = request(&[3], 12);
    unseeded.sampling.seed = None;
    let (ids, last) = collect(engine.submit(unseeded).unwrap());
    let Event::Finished { seed, .. } = last else {
        panic!("{last:?}");
    };
    let mut again = request(&[3], 12);
    again.sampling.seed = Some(seed);
    assert_eq!(ids, generate(&engine, again));
}

#[test]
fn prefill_goes_in_chunks_between_decode_steps() {
    let toy = Toy {
        pace: Duration::from_millis(2),
        ..Toy::default()
    };
    let config = EngineConfig {
        prefill_chunk: 4,
        ..EngineConfig::default()
    };
    let engine = start(toy.clone(), config).unwrap();
    let first = engine.submit(request(&[1], 8000)).unwrap();
    // The first one speaks before the second one comes, and still does when that one is done.
    assert!(first.recv_timeout(PATIENCE).is_some());
    let prompt: Vec<u32> = (0..18).collect();
    assert_eq!(generate(&engine, request(&prompt, 2)).len(), 2);
    drop(first);

    let calls = toy.calls();
    let chunks: Vec<usize> = calls
        .iter()
        .filter_map(|call| match call {
            Call::Prefill(n) => Some(*n),
            Call::Step(_) => None,
        })
        .collect();
    assert_eq!(chunks, [1, 4, 4, 4, 4, 2]);
    let adjacent = calls
        .windows(2)
        .any(|pair| matches!(pair, [Call::Prefill(_), Call::Prefill(_)]));
    assert!(!adjacent, "{calls:?}");
    assert!(calls.contains(&Call::Step(2)), "{calls:?}");
}

#[test]
fn next_turn_computes_only_what_is_new() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let mut turn = request(&[1, 2, 3, 4], 8);
    let reply = generate(&engine, turn.clone());
    let before = engine.stats();

    // The last token drawn is not in the kept state: nothing was computed from it.
    turn.ids.extend(&reply);
    turn.ids.extend([7, 8]);
    let (ids, last) = collect(engine.submit(turn.clone()).unwrap());
    let after = engine.stats();
    let Event::Finished { usage, .. } = last else {
        panic!("{last:?}");
    };
    assert_eq!(usage.n_cached, 4 + 7);
    assert_eq!(after.prefix_hit_tokens - before.prefix_hit_tokens, 4 + 7);
    assert_eq!(after.prefill_tokens - before.prefill_tokens, 3);

    let config = EngineConfig {
        max_snapshots: 0,
        ..EngineConfig::default()
    };
    let forgetful = start(Toy::default(), config).unwrap();
    assert_eq!(ids, generate(&forgetful, turn));
    assert_eq!(forgetful.stats().prefix_hit_tokens, 0);
}

#[test]
fn same_prompt_again_computes_nothing_of_it() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let first = generate(&engine, request(&[1, 2, 3, 4], 8));
    let before = engine.stats().prefill_tokens;
    let again = generate(&engine, request(&[1, 2, 3, 4], 8));
    assert_eq!(first, again);
    assert_eq!(engine.stats().prefill_tokens, before);
}

#[test]
fn dropped_receiver_cancels_the_sequence() {
    let toy = Toy {
        pace: Duration::from_millis(1),
        ..Toy::default()
    };
    let engine = start(toy, EngineConfig::default()).unwrap();
    let receiver = engine.submit(request(&[1], 8000)).unwrap();
    assert!(receiver.recv_timeout(PATIENCE).is_some());
    assert_eq!(engine.stats().running, 1);
    drop(receiver);
    wait_until("cancelling", || engine.stats().running == 0);
    assert_eq!(engine.stats().cancelled, 1);
}

#[test]
fn reader_who_sleeps_is_ended_and_hinders_no_one() {
    let config = EngineConfig {
        max_unread: 4,
        reader_timeout: Duration::from_millis(300),
        ..EngineConfig::default()
    };
    let engine = start(Toy::default(), config).unwrap();
    let asleep = engine.submit(request(&[1], 500)).unwrap();
    assert_eq!(generate(&engine, request(&[2], 50)).len(), 50);
    wait_until("ending the sleeper", || engine.stats().failed == 1);
    let (ids, last) = collect(asleep);
    assert_eq!(ids.len(), 4);
    assert!(matches!(last, Event::Failed(Error::Stalled { .. })));
}

#[test]
fn full_queue_refuses_and_recovers() {
    let toy = Toy {
        pace: Duration::from_millis(1),
        ..Toy::default()
    };
    let config = EngineConfig {
        max_sequences: 1,
        max_waiting: 1,
        ..EngineConfig::default()
    };
    let engine = start(toy, config).unwrap();
    let speaking = engine.submit(request(&[1], 8000)).unwrap();
    assert!(speaking.recv_timeout(PATIENCE).is_some());
    let waiting = engine.submit(request(&[2], 5)).unwrap();
    let refused = engine.submit(request(&[3], 5)).unwrap_err();
    assert_eq!(refused, Error::QueueFull { waiting: 1 });
    assert_eq!(engine.stats().refused, 1);
    drop(speaking);
    assert_eq!(collect(waiting).0.len(), 5);
}

#[test]
fn model_error_fails_the_request_and_spares_the_engine() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let (_, last) = collect(engine.submit(request(&[1, FAILS], 5)).unwrap());
    assert!(matches!(last, Event::Failed(Error::Model { .. })));
    assert_eq!(generate(&engine, request(&[1], 5)).len(), 5);
}

#[test]
fn panic_in_the_model_fails_the_request_and_spares_the_engine() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let (_, last) = collect(engine.submit(request(&[1, PANICS], 5)).unwrap());
    let Event::Failed(Error::Model { reason }) = last else {
        panic!("{last:?}");
    };
    assert!(reason.contains("told to panic"), "{reason}");
    assert_eq!(generate(&engine, request(&[1], 5)).len(), 5);
}

#[test]
fn reply_ends_at_the_contexts_end() {
    let config = EngineConfig {
        context: 10,
        ..EngineConfig::default()
    };
    let engine = start(Toy::default(), config).unwrap();
    assert_eq!(generate(&engine, request(&[1, 2, 3, 4], 500)).len(), 6);
}

#[test]
fn last_handle_ends_the_thread_and_the_sequences() {
    let toy = Toy {
        pace: Duration::from_millis(1),
        ..Toy::default()
    };
    let calls = toy.calls.clone();
    let engine = start(toy, EngineConfig::default()).unwrap();
    let other = engine.clone();
    let receiver = engine.submit(request(&[1], 8000)).unwrap();
    drop(engine);
    assert!(receiver.recv_timeout(PATIENCE).is_some());
    drop(other);
    let (_, last) = collect(receiver);
    assert!(matches!(
        last,
        Event::Finished {
            reason: FinishReason::Cancelled,
            ..
        }
    ));
    // The thread owned the toy, so its end leaves this test the only owner of the log.
    wait_until("the thread's end", || {
        std::sync::Arc::strong_count(&calls) == 1
    });
}

#[test]
fn alternatives_come_with_the_models_own_log_probabilities() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let mut asked = request(&[4], 1);
    asked.top_logprobs = 20;
    asked.sampling.temperature = 0.3;
    let receiver = engine.submit(asked).unwrap();
    let Some(Event::Token { id, logprob, top }) = receiver.recv_timeout(PATIENCE) else {
        panic!("no token");
    };
    let row = logits(&[4]);
    let sum: f32 = row.iter().map(|logit| logit.exp()).sum();
    assert!((logprob - (row[id as usize] - sum.ln())).abs() < 1e-5);
    assert_eq!(top.len(), 20);
    assert!(top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
}

#[test]
fn impossible_requests_are_refused_at_the_door() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let error = engine.submit(request(&[VOCAB as u32], 5)).unwrap_err();
    assert!(matches!(error, Error::TokenId { .. }));
    let mut wild = request(&[1], 5);
    wild.sampling.top_p = 1.5;
    let error = engine.submit(wild).unwrap_err();
    assert!(matches!(error, Error::Sampling { field: "top_p", .. }));
}

#[test]
fn reply_reaches_its_least_length_before_a_stop_token() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let mut eager = request(&[1, 2], 12);
    eager.stop_ids = (0..VOCAB as u32).collect();
    // Everything stops: no token can come before the least length is reached, and the first one then is the last.
    eager.min_tokens = 3;
    let (_, last) = collect(engine.submit(eager).unwrap());
    assert_eq!(last, Event::Failed(Error::NoCandidates));

    let free = generate(&engine, request(&[1, 2], 12));
    let mut patient = request(&[1, 2], 12);
    patient.stop_ids = vec![free[1]];
    patient.min_tokens = 6;
    let ids = generate(&engine, patient);
    assert!(ids.len() >= 6, "{ids:?}");
    assert!(!ids[..6].contains(&free[1]), "{ids:?}");
    let mut late = request(&[1], 2);
    late.min_tokens = 3;
    let error = engine.submit(late).unwrap_err();
    assert!(matches!(error, Error::MinTokens { .. }));
}

/// ln p of `id` after `seen`.
fn log_prob(seen: &[u32], id: u32) -> f32 {
    let row = logits(seen);
    let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
    (f64::from(row[id as usize]) - sum.ln()) as f32
}

#[test]
fn prompt_is_scored_from_its_second_token_on_whatever_is_kept_or_runs() {
    let config = EngineConfig {
        prefill_chunk: 4,
        ..EngineConfig::default()
    };
    let engine = start(Toy::default(), config).unwrap();
    let prompt: Vec<u32> = (0..11).map(|n| n * 7 % 29).collect();
    let mut asked = request(&prompt, 2);
    asked.prompt_logprobs = true;
    asked.top_logprobs = 3;
    // The same prompt is in a kept state from the second round on.
    for round in 0..3 {
        let others: Vec<EventReceiver> = (0..round)
            .map(|n| engine.submit(request(&[n, 3], 50)).unwrap())
            .collect();
        let receiver = engine.submit(asked.clone()).unwrap();
        let Some(Event::Prompt(scored)) = receiver.recv_timeout(PATIENCE) else {
            panic!("no scores");
        };
        let ids: Vec<u32> = scored.iter().map(|scored| scored.id).collect();
        assert_eq!(ids, prompt[1..]);
        for (at, scored) in scored.iter().enumerate() {
            let expected = log_prob(&prompt[..=at], scored.id);
            assert!((scored.logprob - expected).abs() < 1e-5, "{at}");
            assert_eq!(scored.top.len(), 3);
        }
        let (ids, _) = collect(receiver);
        assert_eq!(ids, generate(&engine, request(&prompt, 2)));
        drop(others);
    }
}

#[test]
fn scores_alone_need_no_generated_token() {
    let config = EngineConfig {
        context: 3,
        ..EngineConfig::default()
    };
    let engine = start(Toy::default(), config).unwrap();
    // As long as the context: nothing has to stay free.
    let mut asked = request(&[1, 2, 3], 0);
    assert_eq!(engine.submit(asked.clone()).unwrap_err(), Error::MaxTokens);
    asked.prompt_logprobs = true;
    let events: Vec<Event> = engine.submit(asked).unwrap().collect();
    let [Event::Prompt(scored), Event::Finished { reason, usage, .. }] = events.as_slice() else {
        panic!("{events:?}");
    };
    assert_eq!(scored.len(), 2);
    assert_eq!((*reason, usage.n_generated), (FinishReason::Length, 0));
    assert_eq!(engine.stats().generated_tokens, 0);
}

#[test]
fn request_may_say_which_ids_are_likelier_allowed_or_not_said_in_a_row() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    let free = generate(&engine, request(&[1, 2], 30));

    let mut biased = request(&[1, 2], 5);
    biased.sampling.bias = vec![(9, 100.0)];
    assert_eq!(generate(&engine, biased), [9; 5]);

    let mut allowed = request(&[1, 2], 30);
    allowed.sampling.allowed = vec![4, 5];
    let ids = generate(&engine, allowed);
    assert!(ids.iter().all(|id| [4, 5].contains(id)), "{ids:?}");

    let pair = [free[2], free[3]];
    let mut bad = request(&[1, 2], 30);
    bad.sampling.bad_sequences = vec![pair.to_vec()];
    let ids = generate(&engine, bad);
    assert_eq!(ids[..3], free[..3]);
    assert!(ids.windows(2).all(|window| window != pair), "{ids:?}");

    let mut unknown = request(&[1], 5);
    unknown.sampling.allowed = vec![VOCAB as u32];
    let error = engine.submit(unknown).unwrap_err();
    assert!(matches!(
        error,
        Error::UnknownId {
            field: "allowed_token_ids",
            ..
        }
    ));
}

#[test]
fn repetition_penalty_looks_at_the_prompt_too() {
    let engine = start(Toy::default(), EngineConfig::default()).unwrap();
    // After these the toy's best token is one of them.
    let prompt = [1, 2];
    let plain = logits(&prompt);
    let mut penalised = plain.clone();
    for id in prompt {
        penalised[id as usize] /= 50.0;
    }
    let top = |row: &[f32]| {
        (0..row.len())
            .rev()
            .max_by(|a, b| row[*a].total_cmp(&row[*b]))
            .unwrap() as u32
    };
    assert_ne!(top(&plain), top(&penalised), "the penalty decides");
    let mut asked = Request {
        sampling: Sampling::greedy(),
        ..request(&prompt, 1)
    };
    assert_eq!(generate(&engine, asked.clone()), [top(&plain)]);
    asked.sampling.repetition_penalty = 50.0;
    assert_eq!(generate(&engine, asked), [top(&penalised)]);
}
