//! Sampling profiles as data: what a request that names no values gets.

use serde::{Deserialize, Serialize};
use text::{PersonaProfile, ProfileValues};

use crate::error::{Error, Result};

/// Name of the profile that a character's own values become.
pub const OWN: &str = "Character";

const BUILT_IN: &str = include_str!("../profiles.toml");

/// A named set of sampling values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// What a request calls it; case does not matter.
    pub name: String,
    /// As [`engine::Sampling::temperature`].
    pub temperature: f32,
    /// As [`engine::Sampling::top_p`].
    pub top_p: f32,
    /// As [`engine::Sampling::top_k`].
    pub top_k: u32,
    /// As [`engine::Sampling::presence_penalty`].
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

    /// The same profiles with what a character's file asks for active: one of them, or its own values under the name [`OWN`].
    ///
    /// # Errors
    /// [`Error::ActiveProfile`] for a name that no profile has, [`Error::ProfileValue`] for a value out of range.
    pub fn with_persona(mut self, profile: &PersonaProfile) -> Result<Self> {
        match profile {
            PersonaProfile::Named(name) => self.with_active(name),
            PersonaProfile::Values(values) => {
                let base = self.find(&self.active).cloned();
                let own = base.map(|base| base.changed_by(values)).transpose()?;
                self.list.retain(|profile| profile.name != OWN);
                self.list.extend(own);
                self.with_active(OWN)
            }
        }
    }

    /// All profiles, in the file's order.
    pub fn list(&self) -> &[Profile] {
        &self.list
    }

    /// The name of the one that holds when a request names none.
    pub fn active_name(&self) -> &str {
        &self.active
    }

    /// The profile of a name; case does not matter.
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
    /// This profile's values but for those that a character has of its own.
    fn changed_by(self, values: &ProfileValues) -> Result<Profile> {
        let within = |key: &'static str, value: Option<f32>, low: f32, high: f32| match value {
            Some(value) if !(low..=high).contains(&value) => Err(Error::ProfileValue {
                key,
                value,
                low,
                high,
            }),
            other => Ok(other),
        };
        Ok(Profile {
            name: OWN.to_owned(),
            temperature: within("temperature", values.temperature, 0.0, 10.0)?
                .unwrap_or(self.temperature),
            top_p: within("top_p", values.top_p, 1e-6, 1.0)?.unwrap_or(self.top_p),
            top_k: values.top_k.unwrap_or(self.top_k),
            presence_penalty: within("presence_penalty", values.presence_penalty, -2.0, 2.0)?
                .unwrap_or(self.presence_penalty),
        })
    }

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
    fn character_names_a_profile_or_brings_values_that_keep_the_others() {
        let built_in = || Profiles::built_in().unwrap();
        let named = PersonaProfile::Named("legacy".to_owned());
        assert_eq!(
            built_in().with_persona(&named).unwrap().active_name(),
            "Legacy"
        );
        let values = |temperature| {
            PersonaProfile::Values(ProfileValues {
                temperature: Some(temperature),
                ..ProfileValues::default()
            })
        };
        let profiles = built_in().with_persona(&values(0.25)).unwrap();
        assert_eq!(profiles.active_name(), OWN);
        let own = profiles.find(OWN).unwrap();
        assert_eq!(
            (own.temperature, own.top_p, own.top_k, own.presence_penalty),
            (0.25, 0.8, 20, 1.0)
        );
        assert_eq!(profiles.list().len(), 4);
        let error = built_in().with_persona(&values(-1.0)).unwrap_err();
        assert!(error.to_string().contains("temperature is -1"), "{error}");
        let unknown = PersonaProfile::Named("Wild".to_owned());
        assert!(built_in().with_persona(&unknown).is_err());
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
