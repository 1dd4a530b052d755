//! Rounds of a conversation: who answers whom, what is clipped, what is dropped.

use std::ops::Range;

use super::{Shown, USER_LINES, split_tokens};

/// One round: a run of user lines and the run of assistant lines behind it, as places in a list of lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Round {
    pub user: Range<usize>,
    pub assistant: Range<usize>,
}

impl Round {
    fn tokens(&self, lines: &[Shown<'_>]) -> usize {
        let sum =
            |range: &Range<usize>| lines[range.clone()].iter().map(|l| l.tokens).sum::<usize>();
        sum(&self.user) + sum(&self.assistant)
    }
}

/// Walks over the lines of a scene: runs of others' lines (user), then runs of the assistant's.
/// Others' lines behind the assistant's last are in no round; the first round may have no user line.
pub(crate) fn rounds(n_lines: usize, is_assistant: impl Fn(usize) -> bool) -> Vec<Round> {
    let mut rounds = Vec::new();
    let mut start = 0;
    while start < n_lines {
        let answer = (start..n_lines)
            .find(|i| is_assistant(*i))
            .unwrap_or(n_lines);
        if answer == n_lines {
            break;
        }
        let end = (answer..n_lines)
            .find(|i| !is_assistant(*i))
            .unwrap_or(n_lines);
        rounds.push(Round {
            user: start..answer,
            assistant: answer..end,
        });
        start = end;
    }
    rounds
}

/// How conversations are cut and filtered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Cut between rounds at so many tokens; `None`: never.
    pub split: Option<usize>,
    /// Most tokens of what is kept.
    pub most: usize,
}

/// What becomes of a conversation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The pieces to keep, with their tokens.
    pub kept: Vec<(Vec<Round>, usize)>,
    /// Tokens of user lines before the last ten of a round.
    pub clipped_tokens: usize,
    /// Tokens of the pieces above the limit.
    pub over_limit: Vec<usize>,
    /// Tokens of the pieces in which the assistant talks to nobody.
    pub alone: Vec<usize>,
}

/// Clips, cuts and filters the rounds of one conversation.
pub(crate) fn finish(mut rounds: Vec<Round>, lines: &[Shown<'_>], limits: Limits) -> Outcome {
    let mut outcome = Outcome::default();
    for round in &mut rounds {
        let first = round
            .user
            .end
            .saturating_sub(USER_LINES)
            .max(round.user.start);
        outcome.clipped_tokens += lines[round.user.start..first]
            .iter()
            .map(|l| l.tokens)
            .sum::<usize>();
        round.user.start = first;
    }
    let tokens: Vec<usize> = rounds.iter().map(|r| r.tokens(lines)).collect();
    let limit = limits.split.unwrap_or(usize::MAX);
    let runs = split_tokens::pieces(tokens.iter().copied(), limit);
    for run in runs {
        let sum = tokens[run.clone()].iter().sum();
        let piece = &rounds[run];
        if sum > limits.most {
            outcome.over_limit.push(sum);
        } else if piece.len() == 1 && piece[0].user.is_empty() {
            outcome.alone.push(sum);
        } else {
            outcome.kept.push((piece.to_vec(), sum));
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(tokens: usize) -> Shown<'static> {
        Shown {
            text: "x".into(),
            tokens,
        }
    }

    fn round(user: Range<usize>, assistant: Range<usize>) -> Round {
        Round { user, assistant }
    }

    const UNCUT: Limits = Limits {
        split: None,
        most: 8192,
    };

    #[test]
    fn rounds_drop_what_nobody_answers() {
        let speakers = b"AAuuAuAAuu";
        let got = rounds(speakers.len(), |i| speakers[i] == b'A');
        assert_eq!(
            got,
            [round(0..0, 0..2), round(2..4, 4..5), round(5..6, 6..8)]
        );
    }

    #[test]
    fn clip_keeps_the_last_ten_user_lines() {
        let lines: Vec<_> = (0..13).map(|_| shown(2)).collect();
        let got = finish(vec![round(0..12, 12..13)], &lines, UNCUT);
        assert_eq!(got.kept, [(vec![round(2..12, 12..13)], 22)]);
        assert_eq!(got.clipped_tokens, 4);
    }

    #[test]
    fn filter_drops_talking_to_oneself_and_too_long() {
        let lines = [shown(4097), shown(3), shown(4000)];
        let limits = Limits {
            split: Some(4096),
            most: 4096,
        };
        let got = finish(vec![round(0..0, 0..1), round(1..2, 2..3)], &lines, limits);
        assert_eq!(got.over_limit, [4097]);
        assert_eq!(got.kept, [(vec![round(1..2, 2..3)], 4003)]);
        let got = finish(vec![round(0..0, 2..3), round(1..2, 2..3)], &lines, limits);
        assert_eq!(
            got.alone,
            [4000],
            "a lone opening round cut off by the split goes, too"
        );
    }

    #[test]
    fn limit_itself_is_allowed() {
        let lines = [shown(1), shown(8191)];
        let got = finish(vec![round(0..1, 1..2)], &lines, UNCUT);
        assert_eq!(got.kept.len(), 1);
    }
}
