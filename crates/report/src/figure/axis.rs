//! Where an axis has its ticks, and how numbers are written beside them.

/// Round ticks from 0 to at least `most`, two to six of them: their step is 1, 2, 2.5 or 5 times a power of ten.
pub(super) fn linear(most: u64) -> Vec<u64> {
    let rough = (most.max(4) as f64 / 4.0).max(1.0);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|step| step * power)
        .find(|step| *step >= rough * 0.999 && step.fract() == 0.0)
        .unwrap_or(10.0 * power) as u64;
    let n_steps = most.max(1).div_ceil(step.max(1));
    (0..=n_steps).map(|idx| idx * step).collect()
}

/// A logarithmic axis from half a unit to `most`, so that a single row is still seen: the share of the axis below `n`.
pub(super) fn log_share(n: u64, most: u64) -> f64 {
    const BASE: f64 = 0.5;
    if n == 0 {
        return 0.0;
    }
    (n as f64 / BASE).ln() / (most.max(1) as f64 / BASE).ln()
}

/// The powers of ten up to `most`, every second one if there are more than five.
pub(super) fn decades(most: u64) -> Vec<u64> {
    let all: Vec<u64> = std::iter::successors(Some(1u64), |n| n.checked_mul(10))
        .take_while(|n| *n <= most.max(1))
        .collect();
    let step = if all.len() > 5 { 2 } else { 1 };
    all.into_iter().step_by(step).collect()
}

/// `950`, `1.5k`, `20k`, `3M`.
pub fn short(n: u64) -> String {
    let scaled = |unit: f64, letter: &str| {
        let value = n as f64 / unit;
        let digits =
            usize::from(value < 10.0 && !((value * 10.0).round() as u64).is_multiple_of(10));
        format!("{value:.digits$}{letter}")
    };
    match n {
        0..=999 => n.to_string(),
        1_000..=999_499 => scaled(1e3, "k"),
        999_500..=999_499_999 => scaled(1e6, "M"),
        _ => scaled(1e9, "G"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_reach_the_top() {
        assert_eq!(linear(0), [0, 1]);
        assert_eq!(linear(3), [0, 1, 2, 3]);
        assert_eq!(linear(7), [0, 2, 4, 6, 8]);
        assert_eq!(linear(100), [0, 25, 50, 75, 100]);
        assert_eq!(linear(1_234_567), [0, 500_000, 1_000_000, 1_500_000]);
        for most in 1..3000 {
            let ticks = linear(most);
            assert!(
                ticks[ticks.len() - 1] >= most && (2..=6).contains(&ticks.len()),
                "{most}: {ticks:?}"
            );
        }
        assert_eq!(decades(12_345), [1, 10, 100, 1000, 10_000]);
        assert_eq!(decades(123_456), [1, 100, 10_000]);
    }

    #[test]
    fn numbers_are_short() {
        let all = [
            0,
            999,
            1000,
            1500,
            20_000,
            999_499,
            999_500,
            3_000_000,
            2_500_000_000,
        ]
        .map(short);
        assert_eq!(
            all,
            ["0", "999", "1k", "1.5k", "20k", "999k", "1M", "3M", "2.5G"]
        );
    }

    #[test]
    fn log_axis_shows_a_single_row() {
        assert_eq!(log_share(0, 1000), 0.0);
        assert!(log_share(1, 1000) > 0.05);
        assert_eq!(log_share(1000, 1000), 1.0);
        assert_eq!(log_share(1, 1), 1.0);
    }
}
