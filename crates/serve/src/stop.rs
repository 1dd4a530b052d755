//! Stop strings over a stream: a stop string may begin in one token and end in another, and nothing of it may be shown.

/// Watches growing text for stop strings; text that could still become one is held back.
#[derive(Debug, Clone)]
pub(crate) struct StopStrings {
    stops: Vec<String>,
    /// The stop string that came is shown as well.
    is_shown: bool,
    held: String,
}

/// What may be shown after a push.
#[derive(Debug, PartialEq)]
pub(crate) struct Shown {
    pub text: String,
    /// A stop string came: this was the last text.
    pub stopped: bool,
}

impl StopStrings {
    /// `stops` must hold no empty string.
    pub fn new(stops: Vec<String>, is_shown: bool) -> Self {
        debug_assert!(
            stops.iter().all(|stop| !stop.is_empty()),
            "checked at parse"
        );
        StopStrings {
            stops,
            is_shown,
            held: String::new(),
        }
    }

    /// Adds text; gives out all that can no longer be part of a stop string, up to the earliest stop string.
    pub fn push(&mut self, text: &str) -> Shown {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| {
            let at = self.held.find(stop)?;
            Some((at, at + stop.len()))
        });
        if let Some((begin, end)) = found.min() {
            self.held.truncate(if self.is_shown { end } else { begin });
            return Shown {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let n_held = self.stops.iter().map(|s| overlap(&self.held, s)).max();
        let cut = self.held.len() - n_held.unwrap_or(0);
        let rest = self.held.split_off(cut);
        Shown {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// What was held back, when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(at, _)| at)
        .filter(|at| *at > 0 && text.ends_with(&stop[..*at]))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text shown for `pieces`, piece by piece, and whether a stop string came.
    fn check(stops: &[&str], pieces: &[&str], expect: &[&str], stopped: bool) {
        let mut watch = StopStrings::new(stops.iter().map(|s| (*s).to_owned()).collect(), false);
        let mut shown = Vec::new();
        let mut was_stopped = false;
        for piece in pieces {
            let next = watch.push(piece);
            shown.push(next.text);
            if next.stopped {
                was_stopped = true;
                break;
            }
        }
        if !was_stopped {
            shown.push(watch.finish());
        }
        assert_eq!(
            (shown, was_stopped),
            (expect.iter().map(|s| (*s).to_owned()).collect(), stopped)
        );
    }

    #[test]
    fn stop_string_across_pieces_shows_nothing_of_itself() {
        check(&["END"], &["ab E", "N", "D cd"], &["ab ", "", ""], true);
        check(&["\n\n"], &["a\n", "\nb"], &["a", ""], true);
        check(&["。（"], &["好。", "（笑"], &["好", ""], true);
    }

    #[test]
    fn false_alarm_is_shown_after_all() {
        check(&["END"], &["ab E", "Nd"], &["ab ", "ENd", ""], false);
        check(&["END"], &["EN"], &["", "EN"], false);
        check(&["aab"], &["aa", "aab"], &["", "aa"], true);
    }

    #[test]
    fn earliest_of_several_wins() {
        check(&["yes", "no"], &["say no or yes"], &["say "], true);
    }

    #[test]
    fn stop_string_may_be_shown_but_nothing_behind_it() {
        let mut watch = StopStrings::new(vec!["END".to_owned()], true);
        assert_eq!(watch.push("ab E").text, "ab ");
        let last = watch.push("ND cd");
        assert_eq!((last.text.as_str(), last.stopped), ("END", true));
    }

    #[test]
    fn text_without_stops_passes_through() {
        check(&[], &["a", "b"], &["a", "b", ""], false);
    }
}
