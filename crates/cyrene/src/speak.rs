//! The sampling profile that a command line or a persona names.

use anyhow::Result;
use engine::Sampling;
use serve::Profiles;
use text::Persona;

use crate::misuse;
use crate::ui::Misuse;

/// The sampling values of the profile that `--profile` names, else of the persona's, else of `Adopted`.
///
/// # Errors
/// [`Misuse`] for an unknown name.
pub fn profile(name: Option<&str>, persona: &Persona) -> Result<Sampling> {
    let profiles = profiles(name, persona)?;
    match profiles.find(profiles.active_name()) {
        Some(profile) => Ok(profile.sampling()),
        None => misuse!("no profile `{}`", profiles.active_name()),
    }
}

/// The built-in profiles and the persona's, with the one active that [`profile`] takes.
///
/// # Errors
/// [`Misuse`] for an unknown name.
pub fn profiles(name: Option<&str>, persona: &Persona) -> Result<Profiles> {
    let misuse = |error: serve::Error| anyhow::Error::new(Misuse(error.to_string()));
    let built_in = Profiles::built_in()?;
    let profiles = match &persona.profile {
        Some(profile) => built_in.with_persona(profile).map_err(misuse)?,
        None => built_in,
    };
    match name {
        Some(name) => profiles.with_active(name).map_err(misuse),
        None => Ok(profiles),
    }
}
