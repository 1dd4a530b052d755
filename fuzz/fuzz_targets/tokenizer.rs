#![no_main]

use std::sync::LazyLock;

#[path = "../../crates/text/tests/common/oracle.rs"]
mod oracle;

static ORACLES: LazyLock<Vec<tokenizers::Tokenizer>> =
    LazyLock::new(|| text::fuzz::tokenizers().iter().map(oracle::of).collect());

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    cyrene_fuzz::run("tokenizer", data);
    let said = String::from_utf8_lossy(data);
    for (tokenizer, oracle) in text::fuzz::tokenizers().iter().zip(&*ORACLES) {
        oracle::check(tokenizer, oracle, &said);
    }
});
