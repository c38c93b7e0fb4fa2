//! `hsm`: the tokens of this node, where their PINs come from, and which contexts they hold.
//! No PIN is read here, and none asked for: only its source is found.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use hsm_api::data::BATCH_MAX_ITEMS;
use hsm_core::envelope::Binding;
use raft_store::names::{ContextName, SlotName};
use raft_store::state::lease::MAX_INVOCATIONS;

use super::env::{Env, or_file};
use super::error::ConfigError;
use super::file::{HsmSection, KeySection, SlotSection};
use super::pin::{PinSource, legacy_pin, pin_source};
use super::server::number;
use super::suggest::nearest;

/// Where SoftHSM is on Debian.
const DEFAULT_MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// What the only slot of v1's configuration is called here.
const LEGACY_SLOT: &str = "default";

/// All tokens of this node.
#[derive(Debug, Clone)]
pub struct Hsm {
    /// In the order of their names.
    pub slots: Vec<Slot>,
    /// Contexts whose binding was written down; see [`Hsm::binding`].
    pub bindings: BTreeMap<ContextName, Binding>,
    /// Limits of AES-GCM invocations under one version, of those contexts that have one written down.
    pub max_invocations: BTreeMap<ContextName, u64>,
    /// Versions that `cleanup` keeps.
    pub max_versions: u32,
    /// Days since retirement before `cleanup` may disable a version.
    pub cleanup_after_days: u32,
    /// v1's single-slot mode.
    pub legacy: bool,
    /// v1's list of key versions; in its single-slot mode only. Unset, `metadata.yaml` in the working directory.
    pub metadata_file: Option<PathBuf>,
}

/// One token.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Its name in the configuration and in the cluster.
    pub name: SlotName,
    /// Label of the token.
    pub label: String,
    /// Where its PIN comes from.
    pub pin: PinSource,
    /// What is encrypted in it.
    pub contexts: Vec<ContextName>,
    /// Accept a PIN with less than 128 bits.
    pub insecure_pin: bool,
    /// OS threads, each with its own session.
    pub threads: usize,
    /// Jobs that may wait.
    pub queue: usize,
    /// Its PKCS#11 module.
    pub pkcs11_lib: PathBuf,
}

impl Hsm {
    /// The slot that holds a context.
    #[must_use]
    pub fn slot_of(&self, context: &str) -> Option<&Slot> {
        self.slots
            .iter()
            .find(|slot| slot.contexts.iter().any(|c| c.as_str() == context))
    }

    /// How a context's ciphertexts are bound: v1's default is `private`.
    #[must_use]
    pub fn binding(&self, context: &str) -> Binding {
        self.bindings.get(context).copied().unwrap_or(Binding::Private)
    }
}

#[cfg(test)]
impl Hsm {
    /// These slots and bindings, and nothing else that is written down.
    pub(crate) fn of(slots: Vec<Slot>, bindings: impl IntoIterator<Item = (ContextName, Binding)>) -> Self {
        Self {
            slots,
            bindings: bindings.into_iter().collect(),
            max_invocations: BTreeMap::new(),
            max_versions: 3,
            cleanup_after_days: 30,
            legacy: false,
            metadata_file: None,
        }
    }
}

/// What resolving `hsm` needs from elsewhere.
pub(crate) struct Surroundings<'a> {
    pub(crate) env: Env<'a>,
    /// The configuration file, and its permission bits if it is a file.
    pub(crate) file: &'a Path,
    pub(crate) mode: Option<u32>,
    /// Contexts the ACL names.
    pub(crate) acl_contexts: &'a BTreeSet<String>,
}

impl HsmSection {
    /// The tokens, and warnings for the log.
    pub(crate) fn resolve(
        self,
        around: &Surroundings<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<Hsm, ConfigError> {
        let module = or_file(around.env, "HSM_PKCS11_LIB", self.pkcs11_lib)
            .unwrap_or_else(|| PathBuf::from(DEFAULT_MODULE));
        let slot_id = or_file(around.env, "HSM_SLOT_ID", self.slot_id).filter(|id| !id.is_empty());
        let keys = self.keys.unwrap_or_default();
        let max_invocations = max_invocations(&keys)?;
        let bindings = bindings(keys)?;
        let (slots, legacy) = match (self.slots.filter(|slots| !slots.is_empty()), slot_id) {
            (Some(_), Some(value)) => return Err(ConfigError::TwoSlotModes { value }),
            (None, None) => {
                return Err(ConfigError::missing(
                    "hsm.slots",
                    "write at least one slot: `slots: {exchange: {label: slot-exchange, \
                     pin_file: PATH, contexts: [exchange-key]}}`",
                ));
            }
            (Some(slots), None) => {
                if self.pin.as_ref().is_some_and(|pin| !pin.0.is_empty()) {
                    return Err(ConfigError::invalid(
                        "hsm.pin",
                        "(not shown)",
                        "has no meaning beside hsm.slots",
                        "remove it and give each slot pin_file, pin_credential, pin_env or pin_prompt",
                    ));
                }
                if self.pin_prompt {
                    return Err(ConfigError::invalid(
                        "hsm.pin_prompt",
                        true,
                        "has no meaning beside hsm.slots",
                        "write pin_prompt: true in each slot whose PIN is to be asked for",
                    ));
                }
                (many(slots, &module, around.env)?, false)
            }
            (None, Some(label)) => {
                let pin = legacy_pin(self.pin, self.pin_prompt, around, warnings)?;
                let slot = legacy(label, pin, module, &bindings, around, warnings)?;
                (vec![slot], true)
            }
        };
        let metadata_file = self.metadata_file.filter(|path| !path.as_os_str().is_empty());
        if metadata_file.is_some() && !legacy {
            warnings.push(
                "hsm.metadata_file: read beside hsm.slot_id only, as in version 1; adopt the keys that it names with: \
                 hsmctl key adopt --metadata-file"
                    .to_owned(),
            );
        }
        let hsm = Hsm {
            metadata_file: metadata_file.filter(|_| legacy),
            slots,
            bindings,
            max_invocations,
            max_versions: number("hsm.max_versions", self.max_versions, 3, 1..=1000)?,
            cleanup_after_days: number("hsm.cleanup_after_days", self.cleanup_after_days, 30, 1..=36_500)?,
            legacy,
        };
        check_contexts(&hsm)?;
        for context in around.acl_contexts.iter().filter(|c| hsm.slot_of(c).is_none()) {
            warnings.push(format!(
                "acl.mappings: context {context} belongs to no slot of this node; its callers \
                 are refused here"
            ));
        }
        Ok(hsm)
    }
}

fn many(slots: BTreeMap<String, SlotSection>, module: &Path, env: Env<'_>) -> Result<Vec<Slot>, ConfigError> {
    let mut out: Vec<Slot> = Vec::with_capacity(slots.len());
    for (name, section) in slots {
        let slot = section.resolve(&name, module, env)?;
        if let Some(other) = out
            .iter()
            .find(|other| other.label == slot.label && other.pkcs11_lib == slot.pkcs11_lib)
        {
            return Err(ConfigError::invalid(
                format!("hsm.slots.{name}.label"),
                &slot.label,
                format!("is the token of hsm.slots.{} too", other.name),
                "give each slot a token of its own",
            ));
        }
        out.push(slot);
    }
    Ok(out)
}

impl SlotSection {
    fn resolve(self, name: &str, module: &Path, env: Env<'_>) -> Result<Slot, ConfigError> {
        let key = |field: &str| format!("hsm.slots.{name}.{field}");
        let slot = SlotName::new(name).map_err(ConfigError::name(format!("hsm.slots.{name}")))?;
        let label = self
            .label
            .filter(|label| !label.is_empty())
            .ok_or_else(|| ConfigError::missing(key("label"), "write the label of its token"))?;
        let contexts = self
            .contexts
            .unwrap_or_default()
            .iter()
            .map(|context| ContextName::new(context).map_err(ConfigError::name(key("contexts"))))
            .collect::<Result<_, _>>()?;
        Ok(Slot {
            name: slot,
            label,
            pin: pin_source(
                &key,
                self.pin_env,
                self.pin_file,
                self.pin_credential,
                self.pin_prompt,
                env,
            )?,
            contexts,
            insecure_pin: self.insecure_pin,
            threads: number(&key("threads"), self.threads, 1, 1..=64)?,
            queue: queue(&key("queue"), self.queue)?,
            pkcs11_lib: self.pkcs11_lib.unwrap_or_else(|| module.to_owned()),
        })
    }
}

/// A batch that is larger than the whole queue would be taken only behind nobody, which under a steady load of single
/// requests is never.
fn queue(key: &str, value: Option<usize>) -> Result<usize, ConfigError> {
    match value {
        Some(value) if value < BATCH_MAX_ITEMS => Err(ConfigError::invalid(
            key,
            value,
            "has no room for the largest batch, which would be refused for as long as anybody else waits",
            format!("write {BATCH_MAX_ITEMS} or more; the default is 1024"),
        )),
        value => number(key, value, 1024, BATCH_MAX_ITEMS..=65_536),
    }
}

/// v1's single slot.
fn legacy(
    label: String,
    pin: PinSource,
    module: PathBuf,
    bindings: &BTreeMap<ContextName, Binding>,
    around: &Surroundings<'_>,
    warnings: &mut Vec<String>,
) -> Result<Slot, ConfigError> {
    warnings.push(
        "hsm.slot_id: one slot for all contexts, and its PIN may be short, as in v1; \
         hsm.slots separates contexts and asks for PINs of 128 bits"
            .to_owned(),
    );
    let contexts = if bindings.is_empty() {
        around
            .acl_contexts
            .iter()
            .map(|name| ContextName::new(name).map_err(ConfigError::name("acl.mappings")))
            .collect::<Result<_, _>>()?
    } else {
        bindings.keys().cloned().collect()
    };
    Ok(Slot {
        name: SlotName::new(LEGACY_SLOT).map_err(ConfigError::name("hsm.slot_id"))?,
        label,
        pin,
        contexts,
        insecure_pin: true,
        threads: 1,
        queue: 1024,
        pkcs11_lib: module,
    })
}

fn bindings(
    keys: BTreeMap<String, Option<KeySection>>,
) -> Result<BTreeMap<ContextName, Binding>, ConfigError> {
    keys.into_iter()
        .map(|(name, section)| {
            let key = format!("hsm.keys.{name}");
            let section = section.unwrap_or_default();
            if let Some(kind) = section.kind.filter(|kind| !kind.eq_ignore_ascii_case("aes")) {
                return Err(ConfigError::invalid(
                    format!("{key}.type"),
                    kind,
                    "is not a known kind of key",
                    "write aes",
                ));
            }
            let binding = match section.mode.as_deref() {
                None | Some("" | "private") => Binding::Private,
                Some("shared") => Binding::Shared,
                Some("none") => Binding::None,
                Some(other) => return Err(unknown_mode(&key, other)),
            };
            let name = ContextName::new(&name).map_err(ConfigError::name(key))?;
            Ok((name, binding))
        })
        .collect()
}

/// Below this there is hardly anything to give out in advance, and every second encryption would rotate.
const LEAST_INVOCATIONS: u64 = 1000;

fn max_invocations(
    keys: &BTreeMap<String, Option<KeySection>>,
) -> Result<BTreeMap<ContextName, u64>, ConfigError> {
    let written = |(name, section): (&String, &Option<KeySection>)| {
        let limit = section.as_ref()?.max_invocations?;
        Some((format!("hsm.keys.{name}"), name.clone(), limit))
    };
    keys.iter()
        .filter_map(written)
        .map(|(key, name, limit)| {
            let range = LEAST_INVOCATIONS..=MAX_INVOCATIONS;
            let limit = number(
                &format!("{key}.max_invocations"),
                Some(limit),
                MAX_INVOCATIONS,
                range,
            )?;
            let name = ContextName::new(&name).map_err(ConfigError::name(key))?;
            Ok((name, limit))
        })
        .collect()
}

fn unknown_mode(key: &str, mode: &str) -> ConfigError {
    let known = ["private", "shared", "none"];
    let remedy = nearest(mode, known).map_or_else(
        || "write private (bound to the CN), shared (to the OU) or none".to_owned(),
        |word| format!("did you mean {word}?"),
    );
    ConfigError::invalid(format!("{key}.mode"), mode, "is not a known mode", remedy)
}

fn check_contexts(hsm: &Hsm) -> Result<(), ConfigError> {
    let mut owner: BTreeMap<&str, &SlotName> = BTreeMap::new();
    for slot in &hsm.slots {
        for context in &slot.contexts {
            if let Some(first) = owner.insert(context.as_str(), &slot.name) {
                return Err(ConfigError::ContextInTwoSlots {
                    context: context.to_string(),
                    first: first.to_string(),
                    second: slot.name.to_string(),
                });
            }
        }
    }
    match hsm
        .bindings
        .keys()
        .find(|context| !owner.contains_key(context.as_str()))
    {
        None => Ok(()),
        Some(context) => Err(ConfigError::invalid(
            format!("hsm.keys.{context}"),
            context,
            "belongs to no slot",
            nearest(context.as_str(), owner.keys().copied()).map_or_else(
                || "add it to the contexts of one of hsm.slots, or remove it here".to_owned(),
                |known| format!("did you mean {known}?"),
            ),
        )),
    }
}
