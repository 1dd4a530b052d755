//! Twine stories and what becomes of them.

use super::super::tests::show;
use super::*;

fn check(text: &str, expect: &str) {
    assert_eq!(show(&read(text, Language::En)), expect);
}

#[test]
fn passages_are_scenes_and_links_options() {
    check(
        ":: Start\nThe tide turns.\nBo: Where is the boat?\n[[Ask->Ask]]\n",
        "== Start\n- The tide turns.\n<bo Bo> Where is the boat?\n* Ask\n",
    );
}

#[test]
fn every_way_to_write_a_link_shows_its_label() {
    check(
        ":: Start\n[[a]]\n[[b|x]]\n* [[c->x]]\n[[x<-d]] / [[e|x][$seen to true]]\nYou may [[go home|home]] now.\n<<link \"f\" \"x\">><</link>>\n<<button [[g|x]]>><</button>>\n(link-goto: \"h\", \"x\")\n",
        "== Start\n* a\n* b\n* c\n* d\n* e\n- You may go home now.\n* go home\n* f\n* g\n* h\n! 5 macros (the texts of all their branches were kept), first at line 7\n",
    );
}

#[test]
fn macros_comments_tags_and_images_go() {
    check(
        ":: Start\n<<if $tide gt 2>>Bo: High.<<else>>\nBo: Low.<</if>>\n<<set $a to 1,\n  $b to 2>>Ann: ''Yes'', //quite//. http://a.b\n(if: $x is 1)[(set: $y to 2)Gone (to sea).]\n/* a\ncomment */<b>Bold</b> 1 < 2 <!-- x -->[img[sea.png]]\n[if ready]\n%% not markup\n",
        "== Start\n<bo Bo> High.\n<bo Bo> Low.\n<ann Ann> Yes, quite. http://a.b\n- Gone (to sea).\n- Bold 1 < 2\n- %% not markup\n\
         ! 2 comments, first at line 7\n! 7 macros (the texts of all their branches were kept), first at line 2\n\
         ! 6 HTML tags and emphasis, first at line 5\n! 1 images, first at line 8\n",
    );
}

#[test]
fn variables_are_put_in_or_left_for_the_character_file() {
    check(
        ":: StoryInit\n<<set $name to \"Sam\">><<set $n = 3>>\n:: Start\n$name has $n coins, $5 and <<print $n>>.\n",
        "== Start\n-$ Sam has $n| coins, $5 and $n|.\n! 1 passages of settings, scripts and styles, first at line 1\n\
         ! 1 macros (the texts of all their branches were kept), first at line 4\n\
         ! 1 variables in texts, replaced by the value that they begin with, first at line 4\n\
         ! 1 lines with variables ($name in the story: give their values in [story.variables] of the character file), first at line 4\n",
    );
}

#[test]
fn passages_that_follow_each_other_alone_are_one_scene() {
    check(
        ":: End\nThe end.\n:: Two\nB.\n[[Three]]\n:: Start [tag] {\"position\":\"1,2\"}\nA.\n[[Go on|Two]]\n:: Three\nC.\n[[Left|End]]\n[[Right|Other]]\n:: Ot\\her\nD.\n[[Start over|End]]\n:: Ring\nE.\n[[Ring]]\n",
        "== End\n- The end.\n== Start\n- A.\n* Go on\n- B.\n* Three\n- C.\n* Left\n* Right\n== Other\n- D.\n* Start over\n== Ring\n- E.\n* Ring\n",
    );
}

#[test]
fn code_and_settings_are_passed_over() {
    check(
        ":: StoryTitle\nThe sea\n:: StoryData\n{\"ifid\":\"x\"}\n:: s [script]\nalert(1)\n:: c [stylesheet]\nbody{}\n:: Start\nA.\n",
        "== Start\n- A.\n! 4 passages of settings, scripts and styles, first at line 1\n",
    );
}

#[test]
fn published_pages_are_read() {
    let page = "<html><tw-storydata name=\"Sea\" startnode=\"1\"><style>x</style>\n<tw-passagedata pid=\"1\" name=\"St&quot;art\" tags=\"\" position=\"1,2\">Bo: &quot;Where?&quot; &amp;lt;\n[[Ask-&gt;Two]]</tw-passagedata>\n<tw-passagedata pid=\"2\" name=\"Two\" tags=\"a > b\">Ann: Gone.</tw-passagedata></tw-storydata></html>";
    assert_eq!(
        show(&read_page(page, Language::En)),
        "== St\"art\n<bo Bo> \"Where?\" <\n* Ask\n<ann Ann> Gone.\n"
    );
    assert_eq!(show(&read_page("<tw-passagedata name=", Language::En)), "");
}

/// Would take hours if each of them were searched to the end of the line.
#[test]
fn unclosed_markup_takes_no_longer_than_other_text() {
    let text = format!(":: Start\n{}", "[[<<a <b (if: /* <!-- ".repeat(50_000));
    assert_eq!(read(&text, Language::En).scenes.len(), 1);
}
