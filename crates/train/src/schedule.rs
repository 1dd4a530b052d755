//! The learning rate of every step: warmup, then a decay. A pure function of the step, so that a resumed run has nothing to restore.

use crate::job::{BatchConfig, OptimizerConfig, RunConfig, ScheduleKind};

/// Learning rates of one run of `total_steps` steps.
///
/// Warmup: lr(s) = lr · s / warmup for s < warmup, so the very first step has lr 0. Then, with p = (s − warmup) / (total − warmup):
/// - cosine: min_lr + (lr − min_lr) · ½ · (1 + cos πp)
/// - linear: lr − (lr − min_lr) · p
/// - constant: lr
///
/// Source: transformers `cosine_with_min_lr`, `linear` (which has min_lr 0), `constant_with_warmup`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The shape after warmup.
    pub kind: ScheduleKind,
    /// The highest rate.
    pub lr: f64,
    /// The rate at the end.
    pub min_lr: f64,
    /// Steps that warm up.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// The schedule of a run of `total_steps`; warmup is `warmup_steps` where that is given, else ceil(total · `warmup_ratio`).
    pub fn new(config: &OptimizerConfig, total_steps: u64) -> Self {
        let by_ratio = (total_steps as f64 * config.warmup_ratio).ceil() as u64;
        Schedule {
            kind: config.schedule,
            lr: config.lr,
            min_lr: config.min_lr,
            warmup_steps: config.warmup_steps.unwrap_or(by_ratio),
            total_steps,
        }
    }

    /// The highest learning rate of any step; 0 for a run that learns nothing.
    pub fn highest(&self) -> f64 {
        let rates = (0..self.total_steps).map(|step_idx| self.lr_at(step_idx));
        rates.fold(0.0, f64::max)
    }

    /// The learning rate of the step with this index; the first step of a run has index 0.
    pub fn lr_at(&self, step_idx: u64) -> f64 {
        if step_idx < self.warmup_steps {
            return self.lr * step_idx as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step_idx - self.warmup_steps) as f64 / decay_steps as f64).min(1.0);
        let share = match self.kind {
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            ScheduleKind::Linear => 1.0 - progress,
            ScheduleKind::Constant => 1.0,
        };
        self.min_lr + (self.lr - self.min_lr) * share
    }
}

/// What is odd about the learning rates of a run of `total_steps`, a line each: none above 0, or a lowest one above the highest.
pub fn warnings(
    optimizer: &OptimizerConfig,
    batch: &BatchConfig,
    run: &RunConfig,
    total_steps: u64,
) -> Vec<String> {
    let schedule = Schedule::new(optimizer, total_steps);
    let mut warnings = Vec::new();
    if optimizer.min_lr > optimizer.lr {
        warnings.push(format!(
            "warning: optimizer.min_lr ({:e}) is above optimizer.lr ({:e}), so that the learning rate ends above its start; give min_lr a value of at most lr",
            optimizer.min_lr, optimizer.lr
        ));
    }
    if schedule.highest() == 0.0 {
        let steps = match total_steps {
            1 => "the only step".to_owned(),
            n => format!("each of the {n} steps"),
        };
        let remedy = match optimizer.lr > 0.0 {
            true => format!(
                "of them {} warm up from 0; lower optimizer.warmup_ratio or warmup_steps, or make more steps (batch.rows and batch.accumulate below {} and {}, run.epochs above {})",
                schedule.warmup_steps.min(total_steps),
                batch.rows,
                batch.accumulate,
                run.epochs
            ),
            false => "raise optimizer.lr".to_owned(),
        };
        warnings.push(format!(
            "warning: {steps} has a learning rate of 0, so that nothing is learned: {remedy}"
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_learn_nothing_are_warned_of() {
        let said = |optimizer: OptimizerConfig, steps: u64| -> String {
            let (batch, run) = (BatchConfig::default(), RunConfig::default());
            warnings(&optimizer, &batch, &run, steps).join("\n")
        };
        let default = OptimizerConfig::default;
        // Two small rows with the default batch make one step, and the first step of a warmup has rate 0.
        let one = said(default(), 1);
        assert!(
            one.contains("the only step has a learning rate of 0"),
            "{one}"
        );
        assert!(one.contains("optimizer.warmup_ratio"), "{one}");
        assert_eq!(said(default(), 2), "");
        let no_warmup = OptimizerConfig {
            warmup_ratio: 0.0,
            ..default()
        };
        assert_eq!(said(no_warmup, 1), "");
        let all = OptimizerConfig {
            warmup_steps: Some(9),
            lr: 1e-9,
            ..default()
        };
        let all = said(all, 1);
        assert!(all.contains("nothing is learned"), "{all}");
        let zero = OptimizerConfig {
            lr: 0.0,
            min_lr: 0.0,
            ..default()
        };
        let zero = said(zero, 40);
        assert!(zero.contains("each of the 40 steps"), "{zero}");
        assert!(zero.contains("raise optimizer.lr"), "{zero}");
        let above = OptimizerConfig {
            lr: 0.0,
            ..default()
        };
        let above = said(above, 40);
        assert!(
            above.contains("optimizer.min_lr (2e-6) is above optimizer.lr (0e0)"),
            "{above}"
        );
        assert!(!above.contains("nothing is learned"), "{above}");
    }

    fn check(schedule: Schedule, expect: &[f64]) {
        for (step_idx, want) in expect.iter().enumerate() {
            let got = schedule.lr_at(step_idx as u64);
            assert!(
                (got - want).abs() <= 1e-15,
                "step {step_idx}: {got} != {want}"
            );
        }
    }

    fn cosine(lr: f64, min_lr: f64, warmup_steps: u64, total_steps: u64) -> Schedule {
        Schedule {
            kind: ScheduleKind::Cosine,
            lr,
            min_lr,
            warmup_steps,
            total_steps,
        }
    }

    // The three lists are learning rates that transformers 5.17 gave for these settings.
    #[test]
    fn cosine_agrees_with_transformers() {
        check(
            cosine(2e-5, 2e-6, 1, 5),
            &[
                0.0,
                2e-5,
                1.736396103067893e-5,
                1.1e-5,
                4.6360389693210725e-6,
            ],
        );
        check(
            cosine(1e-3, 1e-4, 2, 8),
            &[
                0.0,
                5e-4,
                1e-3,
                9.397114317029974e-4,
                7.75e-4,
                5.5e-4,
                3.25e-4,
                1.6028856829700258e-4,
            ],
        );
        check(cosine(1.5e-3, 0.0, 1, 3), &[0.0, 1.5e-3, 7.5e-4]);
    }

    #[test]
    fn linear_falls_to_its_minimum() {
        let schedule = Schedule {
            kind: ScheduleKind::Linear,
            ..cosine(1.0, 0.2, 2, 6)
        };
        check(schedule, &[0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]);
    }

    #[test]
    fn constant_stays_after_warmup() {
        let schedule = Schedule {
            kind: ScheduleKind::Constant,
            ..cosine(3e-4, 0.0, 2, 4)
        };
        check(schedule, &[0.0, 1.5e-4, 3e-4, 3e-4]);
    }

    #[test]
    fn warmup_without_steps_starts_at_full_rate() {
        check(cosine(1.0, 0.0, 0, 2), &[1.0, 0.5]);
    }

    #[test]
    fn warmup_steps_are_the_ceiling_of_the_ratio() {
        let config = OptimizerConfig {
            warmup_ratio: 0.1,
            warmup_steps: None,
            ..OptimizerConfig::default()
        };
        for (total_steps, expect) in [(1, 1), (10, 1), (11, 2), (25, 3), (1200, 120)] {
            assert_eq!(Schedule::new(&config, total_steps).warmup_steps, expect);
        }
    }

    #[test]
    fn warmup_steps_override_the_ratio() {
        let config = OptimizerConfig {
            warmup_steps: Some(7),
            ..OptimizerConfig::default()
        };
        assert_eq!(Schedule::new(&config, 100).warmup_steps, 7);
    }
}
