//! Subtitles and what becomes of them.

use super::super::tests::show;
use super::*;

fn shown(imported: Result<Imported, Fault>) -> String {
    match imported {
        Ok(imported) => show(&imported),
        Err(fault) => format!("{}: {}", fault.line, fault.problem),
    }
}

fn check(text: &str, expect: &str) {
    assert_eq!(shown(read_srt(text, Language::En)), expect);
}

fn check_ass(text: &str, expect: &str) {
    assert_eq!(shown(read_ass(text, Language::En)), expect);
}

#[test]
fn cues_that_name_a_speaker_are_dialogue() {
    check(
        "1\n00:00:01,000 --> 00:00:02,500\nBo: Where is the boat?\n\n2\n00:00:03,000 --> 00:00:04,000\nGone.\n",
        "== 1\n<bo Bo> Where is the boat?\n- Gone.\n! 1 cues that name no speaker (they became narration), first at line 6\n",
    );
}

#[test]
fn styles_go_and_the_lines_of_a_cue_are_one() {
    check(
        "1\n00:00:01,000 --> 00:00:02,000\n{\\an8}<i>BO: The tide</i>\n<font color=\"#fff\">is 1 < 2 &amp; high.</font>\n\n2\n00:00:02,000 --> 00:00:03,000\n{\\i1}\n",
        "== 1\n<bo BO> The tide is 1 < 2 & high.\n! 6 tags of style and position in subtitles, first at line 2\n! 1 drawings and empty cues, first at line 7\n",
    );
    let chinese = read_srt(
        "1\n00:00:01,000 --> 00:00:02,000\n潮水\n退了\n",
        Language::Chs,
    )
    .unwrap();
    assert_eq!(
        chinese.scenes[0].lines[0].text.get(Language::Chs),
        Some("潮水退了")
    );
}

#[test]
fn dashes_and_names_part_the_speakers_of_a_cue() {
    check(
        "1\n00:00:01,000 --> 00:00:02,000\n- Bo: Where?\n- Ann: Gone.\n\n2\n00:00:03,000 --> 00:00:04,000\nBo: Oh.\nAnn: Yes.\n",
        "== 1\n<bo Bo> Where?\n<ann Ann> Gone.\n<bo Bo> Oh.\n<ann Ann> Yes.\n",
    );
}

#[test]
fn overlapping_repetitions_count_once_and_later_ones_again() {
    check(
        "1\n00:00:01,000 --> 00:00:03,000\nBo: Gone.\n\n2\n00:00:02,000 --> 00:00:04,000\nBo: Gone.\n\n3\n00:00:09,000 --> 00:00:10,000\nBo: Gone.\n",
        "== 1\n<bo Bo> Gone.\n<bo Bo> Gone.\n! 1 cues that repeat the one before, first at line 6\n",
    );
}

#[test]
fn cues_are_taken_in_the_order_of_their_times() {
    check(
        "2\n00:00:05,000 --> 00:00:06,000\nBo: Two.\n\n1\n00:00:01,000 --> 00:00:02,000\nBo: One.\n",
        "== 1\n<bo Bo> One.\n<bo Bo> Two.\n",
    );
}

#[test]
fn vtt_has_voices_notes_and_identifiers() {
    check(
        "WEBVTT Kind: captions\nLanguage: en\n\nSTYLE\n::cue { color: red }\n\nNOTE\na note --\nof two lines\n\nintro\n00:01.000 --> 00:02.000 position:50% align:start\n<v.loud Old Bo>Gone<00:01.500> to &lt;sea&gt;.</v>\n\n01:00:03.5 --> 01:00:04\n<v Ann>Oh.\n",
        "== 1\n<old-bo Old Bo> Gone to <sea>.\n<ann Ann> Oh.\n! 2 comments, notes and style sheets, first at line 4\n! 2 tags of style and position in subtitles, first at line 12\n",
    );
}

#[test]
fn voices_of_one_cue_each_say_their_own() {
    check(
        "WEBVTT\n\n00:01.000 --> 00:02.000\n<v Bo>Where?</v> <v Ann>Gone.</v>\n\n00:03.000 --> 00:04.000\n<v Bo>Oh.\n<v Ann>Yes, <i>I <3 you -> ok</i>.\n\n00:05.000 --> 00:06.000\n- <v Bo>To\n<v Bo>sea?</v> (Gulls.)\n",
        "== 1\n<bo Bo> Where?\n<ann Ann> Gone.\n<bo Bo> Oh.\n<ann Ann> Yes, I <3 you -> ok.\n<bo Bo> To sea?\n- (Gulls.)\n\
         ! 5 tags of style and position in subtitles, first at line 3\n! 1 cues that name no speaker (they became narration), first at line 10\n",
    );
}

#[test]
fn text_is_kept_behind_empty_lines_and_without_them() {
    check(
        "1\n00:00:01,000 --> 00:00:02,000\nBo: One\n\nand a half.\n2\n00:00:03,000 --> 00:00:04,000\nBo: a --> b\n3\n00:00:05,000 --> 00:00:06,000\nBo: Three.\n",
        "== 1\n<bo Bo> One and a half.\n<bo Bo> a --> b\n<bo Bo> Three.\n",
    );
}

#[test]
fn long_silence_ends_a_scene() {
    let cue = |n: usize, at: usize| {
        format!(
            "{n}\n00:{:02}:{:02},000 --> 00:{:02}:{:02},500\nBo: Line {n}.\n\n",
            at / 60,
            at % 60,
            at / 60,
            at % 60
        )
    };
    let text: String = (0..20)
        .map(|n| cue(n, n + if n < 10 { 0 } else { 60 }))
        .collect();
    let imported = read_srt(&text, Language::En).unwrap();
    let lengths: Vec<usize> = imported
        .scenes
        .iter()
        .map(|scene| scene.lines.len())
        .collect();
    assert_eq!(lengths, [10, 10]);
}

#[test]
fn ass_events_have_speakers_styles_and_comments() {
    check_ass(
        "[Script Info]\nTitle: x\n[V4+ Styles]\nFormat: Name, Fontname\nStyle: Default,Arial\n[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n\
         Dialogue: 0,0:00:05.00,0:00:06.00,Default,Ann,0,0,0,,{\\i1}Gone,{\\i0} to\\Nsea.\n\
         Dialogue: 0,0:00:01.00,0:00:02.00,Default,Bo,0,0,0,,Where\\his the boat?\n\
         Dialogue: 1,0:00:01.00,0:00:02.00,Default,Bo,0,0,0,,{\\blur2}Where\\his the boat?\n\
         Dialogue: 0,0:00:07.00,0:00:08.00,Sign,,0,0,0,,{\\p1}m 0 0 l 10 0{\\p0}\n\
         Comment: 0,0:00:09.00,0:00:09.00,Default,,0,0,0,,check this\n",
        "== 1\n<bo Bo> Where is the boat?\n<ann Ann> Gone, to sea.\n\
         ! 1 comments, notes and style sheets, first at line 12\n! 3 tags of style and position in subtitles, first at line 10\n\
         ! 1 cues that repeat the one before, first at line 10\n! 1 drawings and empty cues, first at line 11\n",
    );
}

#[test]
fn faults_name_their_line() {
    check(
        "1\n00:00:xx --> 00:00:02,000\nGone.\n",
        "2: `00:00:xx --> 00:00:02,000` is no timing like 00:00:01,000 --> 00:00:02,500",
    );
    check(
        "1\n99999999999999999999:0:0 --> 1\nx",
        "2: `99999999999999999999:0:0 --> 1` is no timing like 00:00:01,000 --> 00:00:02,500",
    );
    check_ass(
        "[Events]\nDialogue: 0,1,2\n",
        "2: no line `Format: ...` stands before this event",
    );
    check_ass(
        "[Events]\nFormat: Start, Text, End\n",
        "2: this line must name the columns Start, End and, as the last, Text",
    );
    check_ass(
        "[Events]\nFormat: Start, End, Text\nDialogue: 0:00:01.00\n",
        "3: this event has fewer columns than its `Format:` line, or no times like 0:00:01.00",
    );
}
