//! Ren'Py scripts and what becomes of them.

use super::super::tests::show;
use super::*;

fn check(text: &str, expect: &str) {
    let mut definitions = Definitions::default();
    let imported =
        define(text, &mut definitions).and_then(|()| read(text, &definitions, Language::En));
    let got = match imported {
        Ok(imported) => show(&imported),
        Err(fault) => format!("{}: {}", fault.line, fault.problem),
    };
    assert_eq!(got, expect);
}

#[test]
fn labels_are_scenes_and_menus_options() {
    check(
        "define b = Character(\"Bo\")\nlabel start:\n    \"The tide turns.\"\n    b \"Where is the boat?\"\n    menu:\n        \"Ask\":\n            b \"Gone.\"\n",
        "== start\n- The tide turns.\n<bo Bo> Where is the boat?\n* Ask\n<bo Bo> Gone.\n",
    );
}

#[test]
fn nested_menus_keep_every_branch_in_order() {
    check(
        r#"
label start:
    menu harbour:
        "What now?"
        "Ask" if tide > 2:
            "Bo" "Ask what?"
            menu:
                "The boat":
                    "Bo" "Gone."
                    jump sea
                "Nothing" (icon="x"):
                    pass
        "Leave":
            return
label sea(x=1):
    "Waves."
"#,
        "== start\n- What now?\n* Ask\n<bo Bo> Ask what?\n* The boat\n<bo Bo> Gone.\n* Nothing\n* Leave\n== sea\n- Waves.\n\
         ! 1 conditions and loops (every branch was kept, in the order of the file), first at line 5\n\
         ! 1 jumps and calls (labels were kept in the order of the file), first at line 10\n",
    );
}

#[test]
fn blocks_that_are_no_story_are_passed_over() {
    check(
        r#"
init -1 python:
    def f(x):  # it's a comment
        return {"a": "not a line",
    "b": 'nor this'}
screen hud():
    text "Not said"
image bo happy:
    "bo.png"
    pause 1.0
style big is default
transform t:
    xpos 3
label start:
    $ tide = 3
    python hide:
        renpy.say(None, "not this")
    scene bg harbour with fade
    show bo happy:
        xalign 0.5
    play music "sea.ogg"
    if tide > 2:
        "High."
    elif tide:
        "Low."
    else:
        "Gone."
    frobnicate 3
    "End."
"#,
        "== start\n- High.\n- Low.\n- Gone.\n- End.\n\
         ! 3 Python lines and blocks, first at line 2\n! 4 blocks of screens, styles, images and animations, first at line 6\n\
         ! 3 statements for pictures, sound and timing, first at line 18\n\
         ! 3 conditions and loops (every branch was kept, in the order of the file), first at line 22\n\
         ! 1 statements that are not Ren'Py's own, first at line 28\n",
    );
}

#[test]
fn translations_are_passed_over() {
    check(
        "label start:\n    e \"Hello.\"\ntranslate french start_1a2b:\n    # e \"Hello.\"\n    e \"Bonjour.\"\ntranslate french strings:\n    old \"Ask\"\n    new \"Demander\"\n",
        "== start\n<e e> Hello.\n! 1 lines whose speaker no `define` names (the variable became the name), first at line 2\n! 2 translation blocks, first at line 3\n",
    );
}

#[test]
fn characters_are_known_by_their_names() {
    check(
        r##"
define b = Character(_("Bo"), color="#fff",
    what_prefix='"')
define character.ann = Character(name="Old {b}Ann{/b}")
define -2 q = Character("???")
define p = Character("[pname]")
define n = Character(None, kind=nvl)
$ x = DynamicCharacter("xname")
label start:
    b happy @ -sad "One." with dissolve
    character.ann "Two." (cb=1)
    q "Three."
    p "Four."
    n "Five."
    x "Six."
    narrator "Seven."
    "Bo" "Eight."
"##,
        "== start\n<bo Bo> One.\n<old-ann Old Ann> Two.\n<q ???> Three.\n<p > Four.\n- Five.\n<x > Six.\n- Seven.\n<bo Bo> Eight.\n\
         ! 1 Python lines and blocks, first at line 8\n",
    );
}

#[test]
fn tags_escapes_and_variables_are_put_in() {
    check(
        r#"
default pname = _("Sam")
define b = Character("Bo")
label start:
    b "{i}Well{/i}, [pname!t] \"Tide\" it's {w=0.5}100%% [[sure] {{so}\nhere."
    b "[score] points, [unit.name]; %(gold)d, [bag[0]] and [f(x)]"
    b '{rb}港{/rb}{rt}みなと{/rt}{image=x.png}'
    "It" 'is'
    extend " gone."
    extend "Quite{p}so."
"#,
        "== start\n<bo Bo> Well, Sam \"Tide\" it's 100% [sure] {so}\nhere.\n<bo Bo>$ $score| points, $unit.name|; $gold|, $(bag[0]) and $(fx)\n<bo Bo> 港\n<it It> is gone.Quite so.\n\
         ! 8 text tags such as {b} and {w}, first at line 5\n\
         ! 1 variables in texts, replaced by the value that they begin with, first at line 5\n\
         ! 1 lines with variables ($name in the story: give their values in [story.variables] of the character file), first at line 6\n",
    );
}

#[test]
fn strings_reach_over_lines_and_three_quotes_make_paragraphs() {
    check(
        "label start:\n    \"One\n     two.\"\n    e \"\"\"\n    Three\n    four.\n\n    Five.\n    \"\"\"\n    \"Six # not a comment\" # a comment\n",
        "== start\n- One two.\n<e e> Three four.\n<e e> Five.\n- Six # not a comment\n! 1 lines whose speaker no `define` names (the variable became the name), first at line 4\n",
    );
}

#[test]
fn what_is_never_closed_is_named_with_its_line() {
    check(
        "label start:\n    \"fine\"\n    e \"not closed\n",
        "3: a quote opens here and is never closed",
    );
    check(
        "define b = Character(\n    \"Bo\"\n",
        "1: a bracket opens here and is never closed",
    );
}

/// Would take hours if each of them were searched to the end of the file.
#[test]
fn unclosed_tags_take_no_longer_than_other_text() {
    let text = format!("\"{}\"", "{rt}{a [x %(".repeat(200_000));
    let definitions = Definitions::default();
    assert_eq!(
        read(&text, &definitions, Language::En)
            .unwrap()
            .scenes
            .len(),
        1
    );
}
