//! Many consumes in one call.

use crate::engine::Engine;
use crate::engine::operations::{Admission, check_amount};
use crate::error::{Error, Result};
use crate::flush::commit::Target;
use crate::model::{AMOUNT_MAX, Consume, Usage};

impl Engine {
    /// Counts each as [`consume`](Self::consume) does. Where the configuration asks for the disk,
    /// all of them share one wait for it.
    pub(crate) fn consume_batch(&self, items: &[Consume]) -> Result<Vec<Usage>> {
        for item in items {
            self.quota(item.quota)?;
            check_amount(item.amount)?;
        }
        let mut usages = Vec::with_capacity(items.len());
        let (mut targets, mut stopped) = (Vec::new(), None);
        for &item in items {
            match self.consume_in_batch(item, &mut targets) {
                Ok(usage) => usages.push(usage),
                Err(error) => {
                    stopped = Some(error);
                    break;
                }
            }
        }
        // Also where a later one could not be counted: those before it are acknowledged.
        let durable = self.wait_for_all(&targets);
        match durable.err().or(stopped) {
            None => Ok(usages),
            Some(error) if usages.is_empty() => Err(error),
            Some(source) => {
                let (counted, source) = (usages.len(), Box::new(source));
                Err(Error::BatchCutShort { counted, source })
            }
        }
    }

    /// Waits for nothing: where its record went, if it was logged, is added to the `targets`.
    #[inline]
    fn consume_in_batch(&self, item: Consume, targets: &mut Vec<Option<Target>>) -> Result<Usage> {
        let Consume { user, quota, amount } = item;
        let counter = self.counted(user, quota)?;
        if !self.durable_consumes {
            return self.consume(&counter, amount, false);
        }
        let Admission { state, limit, is_admitted, target } =
            self.add(&counter, amount, Some(AMOUNT_MAX))?;
        let usage = self.consumed(&counter, amount, is_admitted, state, limit)?;
        targets.push(target);
        Ok(usage)
    }

    fn wait_for_all(&self, targets: &[Option<Target>]) -> Result<()> {
        // The last first: the commit that covers it mostly covers all.
        for &target in targets.iter().rev().flatten() {
            self.committer.wait_durable(target)?;
        }
        if targets.iter().any(Option::is_none) { Err(Error::NotLogged) } else { Ok(()) }
    }
}
