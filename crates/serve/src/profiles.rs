//! Sampling profiles as data: what a request that names no values gets.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

const BUILT_IN: &str = include_str!("../profiles.toml");

/// A named set of sampling values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    pub name: String,
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: u32,
    pub presence_penalty: f32,
}

/// All profiles and the one that holds when a request names none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profiles {
    active: String,
    #[serde(rename = "profile")]
    list: Vec<Profile>,
}

impl Profiles {
    /// Suggested, Legacy and Adopted, with Adopted active.
    ///
    /// # Errors
    /// None: the file is built in and tested.
    pub fn built_in() -> Result<Self> {
        Profiles::parse(BUILT_IN)
    }

    /// Profiles in the form of `profiles.toml`.
    ///
    /// # Errors
    /// [`Error::Profiles`] if the text is not in that form, [`Error::ActiveProfile`] if the active one is not in the list.
    pub fn parse(text: &str) -> Result<Self> {
        let profiles: Profiles =
            toml::from_str(text).map_err(|source| Error::Profiles { source })?;
        let active = profiles.active.clone();
        profiles.with_active(&active)
    }

    /// The same profiles with another one active; case does not matter.
    ///
    /// # Errors
    /// [`Error::ActiveProfile`] if no profile has that name.
    pub fn with_active(mut self, name: &str) -> Result<Self> {
        match self.find(name) {
            Some(profile) => self.active = profile.name.clone(),
            None => {
                return Err(Error::ActiveProfile {
                    active: name.to_owned(),
                    known: self.names(),
                });
            }
        }
        Ok(self)
    }

    pub fn list(&self) -> &[Profile] {
        &self.list
    }

    pub fn active_name(&self) -> &str {
        &self.active
    }

    pub fn find(&self, name: &str) -> Option<&Profile> {
        self.list
            .iter()
            .find(|profile| profile.name.eq_ignore_ascii_case(name))
    }

    /// The names, for messages.
    pub fn names(&self) -> String {
        let names: Vec<&str> = self.list.iter().map(|p| p.name.as_str()).collect();
        names.join(", ")
    }
}

impl Profile {
    /// The profile as the engine's sampling values; all else at its default.
    pub fn sampling(&self) -> engine::Sampling {
        engine::Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            presence_penalty: self.presence_penalty,
            ..engine::Sampling::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_profiles_hold_the_agreed_values() {
        let profiles = Profiles::built_in().unwrap();
        let values: Vec<(&str, f32, f32, u32, f32)> = profiles
            .list()
            .iter()
            .map(|p| {
                (
                    p.name.as_str(),
                    p.temperature,
                    p.top_p,
                    p.top_k,
                    p.presence_penalty,
                )
            })
            .collect();
        assert_eq!(
            values,
            [
                ("Suggested", 0.7, 0.8, 20, 1.5),
                ("Legacy", 0.1, 0.8, 10, 0.0),
                ("Adopted", 0.5, 0.8, 20, 1.0),
            ]
        );
        assert_eq!(profiles.active_name(), "Adopted");
    }

    #[test]
    fn unknown_active_profile_is_refused_with_the_known_ones() {
        let error = Profiles::built_in()
            .unwrap()
            .with_active("Wild")
            .unwrap_err();
        assert!(error.to_string().contains("Suggested, Legacy, Adopted"));
    }
}
