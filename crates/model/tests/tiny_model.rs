//! A seeded model of a few thousand weights, which needs no file: calculus, independence of documents, generation, memory.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{Row, assert_close, named, sum, tiny, tiny_json, trainable};
use kernel::DType;
use model::{Config, Decoder, LoraConfig, Model, Recompute, Saved, SequenceState, TrainPass};

fn loss(model: &Model, saved: &mut Saved, row: &Row) -> f64 {
    sum(&model.nll(saved, &row.batch()).unwrap())
}

/// Checks each gradient by central differences of the f32 loss along its own direction, where the loss moves most against rounding.
fn check_slopes(model: &mut Model, loss: impl Fn(&Model) -> f64, grads: model::Gradients) {
    for (i, name) in model.trainable_names().iter().enumerate() {
        let grad = grads.tensors[i].f32s();
        let norm = grad
            .iter()
            .map(|g| f64::from(*g).powi(2))
            .sum::<f64>()
            .sqrt();
        assert!(norm > 0.0, "{name} has no gradient");
        let mut shifted = |distance: f64| {
            let original = model.trainable_mut()[i].clone();
            for (w, g) in std::iter::zip(model.trainable_mut()[i].f32s_mut(), grad) {
                *w += (distance * f64::from(*g) / norm) as f32;
            }
            let value = loss(model);
            *model.trainable_mut()[i] = original;
            value
        };
        // A step that moves the loss by about 0.05: rounding is some 1e-5 of that loss. Richardson's rule takes out the curvature.
        let step = (0.05 / norm).min(1e-2);
        let mut central = |h: f64| (shifted(h) - shifted(-h)) / (2.0 * h);
        let slope = (4.0 * central(step / 2.0) - central(step)) / 3.0;
        assert!(
            (slope - norm).abs() < 5e-3 * norm + 5e-3,
            "{name}: slope {slope}, gradient {norm}"
        );
    }
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    for tied in [true, false] {
        let mut model = tiny(tied, 5);
        let row = Row::seeded(&[9, 30, 5], 61, 1);
        let mut grads = model.gradients().unwrap();
        let mut saved = Saved::default();
        let nll = model
            .forward_backward(&mut saved, &mut grads, &row.batch(), 1.0, 0)
            .unwrap();
        assert_close(
            "nll",
            &nll,
            &model.nll(&mut saved, &row.batch()).unwrap(),
            1e-6,
        );
        check_slopes(&mut model, |m| loss(m, &mut Saved::default(), &row), grads);
    }
}

#[test]
fn adapter_gradients_are_the_slopes_of_the_loss() {
    let mut model = tiny(true, 6);
    let config = LoraConfig {
        rank: 3,
        alpha: 6.0,
        dropout: 0.0,
        targets: Vec::new(),
    };
    model.attach_lora(&config, 9).unwrap();
    for (i, tensor) in model.trainable_mut().into_iter().enumerate() {
        for (j, w) in tensor.f32s_mut().iter_mut().enumerate() {
            *w += 0.1 * ((i * 31 + j * 7) % 11) as f32 / 11.0 - 0.05;
        }
    }
    let row = Row::seeded(&[20, 11], 61, 2);
    let mut grads = model.gradients().unwrap();
    model
        .forward_backward(&mut Saved::default(), &mut grads, &row.batch(), 1.0, 0)
        .unwrap();
    check_slopes(&mut model, |m| loss(m, &mut Saved::default(), &row), grads);
}

#[test]
fn adapter_with_dropout_has_the_gradient_of_its_own_mask() {
    let mut model = tiny(true, 7);
    let config = LoraConfig {
        rank: 3,
        alpha: 6.0,
        dropout: 0.4,
        targets: vec!["in_proj_qkv".into(), "q_proj".into(), "down_proj".into()],
    };
    model.attach_lora(&config, 9).unwrap();
    for tensor in model.trainable_mut() {
        for (j, w) in tensor.f32s_mut().iter_mut().enumerate() {
            *w += 0.02 * ((j * 7) % 11) as f32 - 0.1;
        }
    }
    let row = Row::seeded(&[20, 11], 61, 2);
    let with_seed = |model: &Model, seed: u64| {
        let mut grads = model.gradients().unwrap();
        let nll = model
            .forward_backward(&mut Saved::default(), &mut grads, &row.batch(), 1.0, seed)
            .unwrap();
        (sum(&nll), grads)
    };
    let (first, grads) = with_seed(&model, 3);
    let (other, _) = with_seed(&model, 4);
    assert_ne!(first, other);
    assert_ne!(first, loss(&model, &mut Saved::default(), &row));
    check_slopes(&mut model, |m| with_seed(m, 3).0, grads);
}

#[test]
fn fresh_adapter_changes_nothing_and_freezes_the_weights() {
    let mut model = tiny(false, 8);
    let row = Row::seeded(&[25], 61, 3);
    let mut saved = Saved::default();
    let before = model.nll(&mut saved, &row.batch()).unwrap();
    let config = LoraConfig {
        rank: 2,
        alpha: 4.0,
        dropout: 0.0,
        targets: vec!["q_proj".to_owned(), "out_proj".to_owned()],
    };
    model.attach_lora(&config, 1).unwrap();
    assert_eq!(model.nll(&mut saved, &row.batch()).unwrap(), before);
    let names = model.trainable_names();
    assert_eq!(names.len(), 2 * 3);
    assert!(
        names
            .iter()
            .all(|n| n.starts_with("base_model.model.model.language_model."))
    );
    let mut grads = model.gradients().unwrap();
    model
        .forward_backward(&mut saved, &mut grads, &row.batch(), 1.0, 0)
        .unwrap();
    // B is zero, so only B has a gradient at first.
    for (name, grad) in named(&model, grads) {
        let moved = grad.f32s().iter().any(|g| *g != 0.0);
        assert_eq!(moved, name.contains("lora_B"), "{name}");
    }
    model.merge_lora().unwrap();
    assert_eq!(model.nll(&mut saved, &row.batch()).unwrap(), before);
    assert_eq!(
        model.trainable_names().len(),
        model.gradients().unwrap().tensors.len()
    );
}

#[test]
fn documents_never_see_each_other() {
    // Heads that forget slowly (decay exp(-0.01 softplus(..)) a token) would show a leak; others hide it.
    let mut model = tiny(true, 11);
    for name in model.trainable_names() {
        if name.ends_with("A_log") {
            trainable(&mut model, &name).f32s_mut().fill(0.01f32.ln());
        }
        if name.ends_with("dt_bias") {
            trainable(&mut model, &name).f32s_mut().fill(-4.0);
        }
    }
    let run = |first_seed: u64| {
        let mut row = Row::seeded(&[70, 50], 61, 21);
        let other = Row::seeded(&[70], 61, first_seed);
        row.tokens_t[..70].copy_from_slice(&other.tokens_t);
        // Loss on document 2 only: no gradient may come from or through document 1.
        row.targets_t[..70].fill(-1);
        let mut grads = model.gradients().unwrap();
        let nll = model
            .forward_backward(&mut Saved::default(), &mut grads, &row.batch(), 0.1, 0)
            .unwrap();
        (nll, grads.tensors)
    };
    let (nll, grads) = run(1);
    let (nll_other, grads_other) = run(2);
    assert!(nll[70..119].iter().all(|x| *x > 0.0));
    assert_eq!(nll, nll_other);
    assert_eq!(grads, grads_other);
}

#[test]
fn generation_matches_full_forward_however_it_is_cut() {
    for dtype in [DType::F32, DType::Bf16] {
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 2e-2 };
        let config = Config::from_json(&tiny_json(false)).unwrap();
        let model = Model::init(config, 13, dtype);
        let tokens_t = Row::seeded(&[150], 61, 4).tokens_t;
        let expected = model
            .logits(&mut Saved::default(), &tokens_t, &[0, 150])
            .unwrap();
        for piece in [1, 7, 64, 65, 150] {
            let mut state = model.new_state().unwrap();
            let mut logits = Vec::new();
            for tokens in tokens_t.chunks(piece) {
                logits.extend_from_slice(model.prefill_all(&mut state, tokens).unwrap().f32s());
            }
            assert_close(
                &format!("{dtype} {piece}"),
                &logits,
                expected.f32s(),
                tolerance,
            );
        }
    }
}

#[test]
fn batched_step_equals_single_steps_and_clones_go_their_own_way() {
    let model = tiny(true, 14);
    let prompts = [3, 40, 1].map(|n| Row::seeded(&[n], 61, n as u64).tokens_t);
    let mut together: Vec<SequenceState> = prompts
        .iter()
        .map(|prompt| {
            let mut state = model.new_state().unwrap();
            model.prefill(&mut state, prompt).unwrap();
            state
        })
        .collect();
    let mut apart: Vec<SequenceState> = together
        .iter()
        .map(|state| state.snapshot().unwrap())
        .collect();
    for step in 0..70 {
        let tokens = [step % 61, (step * 7) % 61, (step * 5 + 3) % 61];
        let mut states: Vec<&mut SequenceState> = together.iter_mut().collect();
        let logits = model.step(&mut states, &tokens).unwrap();
        for (i, state) in apart.iter_mut().enumerate() {
            let single = model.step(&mut [state], &tokens[i..=i]).unwrap();
            let row = &logits.f32s()[i * 61..][..61];
            assert_close(
                &format!("sequence {i} step {step}"),
                row,
                single.f32s(),
                1e-5,
            );
        }
    }
    assert_eq!(together[1].position(), 110);
    assert!(together[1].bytes() > model.new_state().unwrap().bytes());
}

/// The decoder's ops by their definitions: the same numbers as the layers' own step, from states that a prefill left.
#[test]
fn decoder_equals_step_and_leaves_states_that_both_go_on_from() {
    let model = tiny(true, 15);
    let mut decoder = Decoder::new(&model, 2).unwrap();
    let prompts = [5, 1, 70].map(|n| Row::seeded(&[n], 61, n as u64).tokens_t);
    let mut decoded: Vec<SequenceState> = prompts
        .iter()
        .map(|prompt| {
            let mut state = model.new_state().unwrap();
            model.prefill(&mut state, prompt).unwrap();
            state
        })
        .collect();
    let mut stepped: Vec<SequenceState> = decoded
        .iter()
        .map(|state| state.snapshot().unwrap())
        .collect();
    for step in 0..12 {
        let tokens = [step % 61, (step * 7) % 61, (step * 5 + 3) % 61];
        let mut states: Vec<&mut SequenceState> = stepped.iter_mut().collect();
        let want = model.step(&mut states, &tokens).unwrap();
        let mut states: Vec<&mut SequenceState> = decoded.iter_mut().collect();
        // A step of the other kind in between finds what this one left.
        if step == 7 {
            model.step(&mut states, &tokens).unwrap();
            continue;
        }
        decoder.step(&model, &mut states, &tokens).unwrap();
        let got = decoder.logits().unwrap();
        assert_close(&format!("step {step}"), got.f32s(), want.f32s(), 1e-4);
        assert_eq!(decoder.logits_of(1).unwrap(), got.f32s()[61..122]);
        let candidates = decoder.candidates().unwrap();
        assert_eq!(candidates[2].as_ref().unwrap().logits, got.f32s()[122..]);
    }
    assert_eq!(decoded[2].position(), 82);
    let mut one = [&mut decoded[0]];
    assert!(decoder.step(&model, &mut one, &[61]).is_err());
    assert!(decoder.step(&model, &mut one, &[]).is_err());
}

#[test]
fn saved_bytes_are_predicted_exactly_and_reused() {
    for dtype in [DType::F32, DType::Bf16] {
        let config = Config::from_json(&tiny_json(true)).unwrap();
        let model = Model::init(config, 1, dtype);
        let mut saved = Saved::default();
        let mut grads = model.gradients().unwrap();
        for lengths in [vec![40, 24], vec![9], vec![64]] {
            let row = Row::seeded(&lengths, 61, 5);
            model
                .forward_backward(&mut saved, &mut grads, &row.batch(), 1.0, 0)
                .unwrap();
            let n = row.tokens_t.len();
            let predicted = Saved::bytes_for(model.config(), n, dtype, &[]);
            assert_eq!(saved.bytes(), predicted);
        }
    }
}

#[test]
fn what_is_recomputed_is_the_same_to_the_bit() {
    let mut model = tiny(true, 22);
    let n_layers = model.config().layer_types.len();
    let lora = LoraConfig {
        rank: 4,
        alpha: 8.0,
        dropout: 0.3,
        targets: Vec::new(),
    };
    for with_lora in [false, true] {
        if with_lora {
            model.attach_lora(&lora, 3).unwrap();
        }
        let run = |policy: Vec<Recompute>| {
            let row = Row::seeded(&[33, 12], 61, 6);
            let mut grads = model.gradients().unwrap();
            let mut saved = Saved::with_policy(policy.clone());
            let nll = model
                .forward_backward(&mut saved, &mut grads, &row.batch(), 1.0, 9)
                .unwrap();
            let dtype = model.dtype();
            let predicted = Saved::bytes_for(model.config(), 45, dtype, &policy);
            assert_eq!(saved.bytes(), predicted, "{policy:?}");
            (nll, grads.tensors, saved.bytes())
        };
        let (nll, grads, all) = run(vec![Recompute::Nothing; n_layers]);
        let mixed = (0..n_layers)
            .map(|layer| {
                [
                    Recompute::Layer,
                    Recompute::Nothing,
                    Recompute::FeedForward,
                    Recompute::Elementwise,
                ][layer % 4]
            })
            .collect();
        for policy in [
            Vec::new(),
            vec![Recompute::FeedForward; n_layers],
            vec![Recompute::Layer; n_layers],
            mixed,
        ] {
            let is_mixed = policy.windows(2).any(|pair| pair[0] != pair[1]);
            let (again_nll, again, less) = run(policy);
            assert_eq!(again_nll, nll);
            assert_eq!(again, grads);
            // What is shared may cost a mixed choice more than it saves in a model of so few layers.
            assert!(less < all || is_mixed, "{less} bytes of {all}");
        }
    }
}

#[test]
fn each_policy_keeps_less_and_recomputes_more() {
    let config = Config::from_json(&tiny_json(true)).unwrap();
    let pass = TrainPass {
        config: &config,
        dtype: DType::F32,
        lora: None,
        n_tokens: 64,
        longest: 64,
    };
    let policies = Recompute::policies(&config);
    let n_layers = config.layer_types.len();
    assert_eq!(policies.first(), Some(&vec![Recompute::Nothing; n_layers]));
    assert_eq!(policies.last(), Some(&vec![Recompute::Layer; n_layers]));
    for pair in policies.windows(2) {
        let [more, less] = [&pair[0], &pair[1]].map(|policy| {
            (
                pass.recomputed_operations(policy),
                pass.recomputed_bytes(policy),
            )
        });
        assert!(less.0 >= more.0 && less.1 >= more.1 && less != more);
    }
    let bytes = |policy: &Vec<Recompute>| pass.activation_bytes(policy);
    assert!(bytes(policies.last().unwrap()) < bytes(&policies[0]));
}

#[test]
fn specs_are_those_of_the_model() {
    for (json, lora) in [
        (tiny_json(true), None),
        (tiny_json(false), None),
        (tiny_json(true), Some(vec![])),
        (
            tiny_json(false),
            Some(vec!["q_proj".to_owned(), "in_proj_z".to_owned()]),
        ),
    ] {
        let config = Config::from_json(&json).unwrap();
        let lora = lora.map(|targets| LoraConfig {
            rank: 4,
            alpha: 8.0,
            dropout: 0.0,
            targets,
        });
        let mut model = Model::init(config.clone(), 1, DType::Bf16);
        if let Some(lora) = &lora {
            model.attach_lora(lora, 2).unwrap();
        }
        let pass = TrainPass {
            config: &config,
            dtype: DType::Bf16,
            lora: lora.as_ref(),
            n_tokens: 1,
            longest: 1,
        };
        let names = model.trainable_names();
        let specs = pass.trained();
        assert_eq!(specs.len(), names.len());
        for ((spec, name), tensor) in specs.iter().zip(&names).zip(model.trainable()) {
            assert!(name.ends_with(&spec.name), "{name} {}", spec.name);
            let got = (tensor.shape(), tensor.dtype());
            assert_eq!((spec.shape.as_slice(), spec.dtype), got, "{name}");
        }
        let n_weights: usize = pass.weights().iter().map(|spec| spec.numel()).sum();
        let n_adapter: usize = match lora {
            Some(_) => specs.iter().map(|spec| spec.numel()).sum(),
            None => 0,
        };
        assert_eq!(n_weights - n_adapter, config.n_params() as usize);
    }
}

#[test]
fn lora_scratch_is_predicted_and_reserved() {
    let cases: [(f32, &[&str]); 4] = [
        (0.0, &[]),
        (0.2, &[]),
        // A part of the linear layers, the first of which is not the model's first.
        (0.0, &["q_proj", "o_proj"]),
        (0.2, &["down_proj"]),
    ];
    for (dropout, targets) in cases {
        let config = Config::from_json(&tiny_json(true)).unwrap();
        let lora = LoraConfig {
            rank: 4,
            alpha: 8.0,
            dropout,
            targets: targets.iter().map(|name| (*name).to_owned()).collect(),
        };
        let mut model = Model::init(config.clone(), 1, DType::F32);
        model.attach_lora(&lora, 2).unwrap();
        let mut saved = Saved::default();
        model.reserve(&mut saved, 45).unwrap();
        let reserved = (saved.bytes(), saved.lora_bytes());
        let mut grads = model.gradients().unwrap();
        let row = Row::seeded(&[33, 12], 61, 6);
        model
            .forward_backward(&mut saved, &mut grads, &row.batch(), 1.0, 9)
            .unwrap();
        let taken = (saved.bytes(), saved.lora_bytes());
        assert_eq!(taken, reserved, "{:?}", lora.targets);
        let pass = TrainPass {
            config: &config,
            dtype: DType::F32,
            lora: Some(&lora),
            n_tokens: 45,
            longest: 45,
        };
        let predicted = pass.activation_bytes(&[]) - saved.bytes();
        assert_eq!(saved.lora_bytes(), predicted);
    }
}

#[test]
fn same_seed_and_row_give_the_same_bytes() {
    let run = || {
        let model = tiny(true, 21);
        let row = Row::seeded(&[33, 12], 61, 6);
        let mut grads = model.gradients().unwrap();
        let nll = model
            .forward_backward(&mut Saved::default(), &mut grads, &row.batch(), 1.0, 0)
            .unwrap();
        (nll, grads.tensors)
    };
    assert_eq!(run(), run());
}

#[test]
fn fresh_weights_are_as_documented() {
    let mut model = tiny(false, 30);
    let n_params: usize = model.trainable().iter().map(|t| t.numel()).sum();
    assert_eq!(n_params as u64, model.config().n_params());
    let prefix = "model.language_model.layers.0.";
    let mut values = |name: &str| {
        trainable(&mut model, &format!("{prefix}{name}"))
            .f32s()
            .to_vec()
    };
    assert!(values("input_layernorm.weight").iter().all(|w| *w == 0.0));
    assert!(values("linear_attn.norm.weight").iter().all(|w| *w == 1.0));
    assert!(values("linear_attn.dt_bias").iter().all(|w| *w == 1.0));
    assert!(
        values("linear_attn.A_log")
            .iter()
            .all(|w| *w < 16f32.ln() && w.is_finite())
    );
    let matrix = values("mlp.up_proj.weight");
    let std = (sum(&matrix.iter().map(|w| w * w).collect::<Vec<_>>()) / matrix.len() as f64).sqrt();
    assert!((std - 0.2).abs() < 0.02, "{std}");
    assert!(
        values("linear_attn.conv1d.weight")
            .iter()
            .any(|w| w.abs() > 0.3)
    );
}
