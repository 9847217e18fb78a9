//! API keys, their organisations, and the budgets of both.

use std::collections::{HashMap, HashSet};
use std::error::Error;

use serde::Deserialize;
use tollgate::{Consume, Quota, QuotaId, Tollgate, Window};

/// The accounts of the demonstration, which also show the form of the file.
pub(crate) const DEMO: &str = include_str!("accounts.toml");

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    window: WindowName,
    organisations: Vec<Organisation>,
    keys: Vec<Key>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum WindowName {
    Lifetime,
    Minute,
    Hour,
    #[default]
    Day,
    Month,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Organisation {
    name: String,
    id: u64,
    tokens: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Key {
    key: String,
    id: u64,
    organisation: String,
    tokens: u64,
}

/// Who a request is charged to.
#[derive(Debug, Clone)]
pub(crate) struct Account {
    pub(crate) key_id: u64,
    pub(crate) organisation_id: u64,
    pub(crate) organisation: String,
}

/// The accounts, with their budgets installed in the engine.
#[derive(Debug)]
pub(crate) struct Accounts {
    by_key: HashMap<String, Account>,
    key_tokens: QuotaId,
    organisation_tokens: QuotaId,
}

impl Accounts {
    /// Reads the accounts, defines the two quotas, and gives everyone their budget.
    ///
    /// # Errors
    /// They are printed, so they repeat none of the text: any part of it may be a key.
    pub(crate) fn install(text: &str, gate: &Tollgate) -> Result<Self, Box<dyn Error>> {
        let File { window, organisations, keys } =
            toml::from_str(text).map_err(|error| unreadable(text, &error))?;
        // Whoever is not in the file has nothing.
        let quota = |name| Quota::new(name, 0).window(window.meaning());
        let key_tokens = gate.define(quota("key-tokens"))?;
        let organisation_tokens = gate.define(quota("organisation-tokens"))?;
        let mut ids = HashMap::new();
        for Organisation { name, id, tokens } in organisations {
            set_budget(gate, id, organisation_tokens, tokens)?;
            if ids.values().any(|&known| known == id) || ids.insert(name, id).is_some() {
                return Err(format!("the organisation with id {id} stands twice").into());
            }
        }
        let mut by_key = HashMap::new();
        let mut key_ids = HashSet::new();
        for Key { key, id, organisation, tokens } in keys {
            let Some(&organisation_id) = ids.get(&organisation) else {
                return Err(format!("key {id}: there is no such organisation").into());
            };
            set_budget(gate, id, key_tokens, tokens)?;
            let account = Account { key_id: id, organisation_id, organisation };
            if !key_ids.insert(id) || by_key.insert(key, account).is_some() {
                return Err(format!("key {id} stands twice").into());
            }
        }
        Ok(Self { by_key, key_tokens, organisation_tokens })
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Account> {
        self.by_key.get(key)
    }

    /// The counters that a request is charged to: the key's, then the organisation's.
    pub(crate) fn counters(&self, account: &Account, amount: u64) -> [Consume; 2] {
        let Account { key_id, organisation_id, .. } = *account;
        [
            Consume { user: key_id, quota: self.key_tokens, amount },
            Consume { user: organisation_id, quota: self.organisation_tokens, amount },
        ]
    }
}

/// The line only: what is wrong with it can't be said in the parser's words, which quote it.
fn unreadable(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    format!("line {line}: this is not the form of examples/token_gateway/accounts.toml")
}

/// Waits for the disk where the budget is a new one, so it is for the start only.
fn set_budget(gate: &Tollgate, user: u64, quota: QuotaId, tokens: u64) -> tollgate::Result<()> {
    if gate.usage(user, quota)?.limit == tokens {
        return Ok(());
    }
    gate.set_limit(user, quota, tokens)
}

impl WindowName {
    fn meaning(&self) -> Window {
        match self {
            Self::Lifetime => Window::Lifetime,
            Self::Minute => Window::Minute,
            Self::Hour => Window::Hour,
            Self::Day => Window::Day,
            Self::Month => Window::Month,
        }
    }
}
