//! `cyrene recipe`: every key explained, or one of the bundled recipes with its keys explained.

use std::path::Path;

use anyhow::Result;
use files::outside;

use crate::cli::Recipe as Args;
use crate::misuse;
use crate::recipe::{Recipe, explain, reference};
use crate::ui::Ui;

/// The recipes of `recipes/`, by name.
pub const BUNDLED: &[(&str, &str)] = &[
    (
        "tiny-cpt",
        include_str!("../../../../recipes/tiny-cpt.toml"),
    ),
    (
        "tiny-sft",
        include_str!("../../../../recipes/tiny-sft.toml"),
    ),
    (
        "small-cpt",
        include_str!("../../../../recipes/small-cpt.toml"),
    ),
    (
        "small-sft",
        include_str!("../../../../recipes/small-sft.toml"),
    ),
    ("cpt", include_str!("../../../../recipes/cpt.toml")),
    (
        "cpt-lora",
        include_str!("../../../../recipes/cpt-lora.toml"),
    ),
    ("sft", include_str!("../../../../recipes/sft.toml")),
];

/// Text of a bundled recipe.
pub fn bundled(name: &str) -> Option<&'static str> {
    BUNDLED
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, text)| *text)
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let Some(name) = &args.name else {
        return ui.result(&serde_json::json!({ "recipe": reference() }), || {
            reference().trim_end().to_owned()
        });
    };
    let text = match bundled(name) {
        Some(text) => text.to_owned(),
        None => match outside::read_text(Path::new(name)) {
            Ok(text) => text,
            Err(error) => {
                let names: Vec<&str> = BUNDLED.iter().map(|(name, _)| *name).collect();
                misuse!(
                    "no bundled recipe and no readable file `{name}` ({error}); bundled are {}",
                    names.join(", ")
                )
            }
        },
    };
    let recipe = Recipe::parse(&text, name, &[])?;
    let resolved = recipe.resolved()?;
    ui.result(&recipe, || {
        format!(
            "# {name}, with the keys it does not set at their defaults\n{}",
            explain(&resolved).trim_end()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundled_recipes_parse() {
        for (name, text) in BUNDLED {
            Recipe::parse(text, name, &[]).unwrap();
        }
    }
}
