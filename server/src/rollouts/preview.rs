//! Who a rollout would reach.

use std::collections::{BTreeMap, HashSet};

use fwpush_keys::id::{DeviceId, HwId};

use super::{
    RolloutError, Target,
    eligible::{Unfit, judge},
};
use crate::{
    db::{Db, DeviceFilter, DeviceRecord, ReleaseRow, states},
    limits,
    rollout::RolloutAction,
    route::Route,
};

/// Who a rollout would reach, and who is left out.
#[derive(Clone, Debug, Default)]
pub struct Preview {
    pub eligible: u64,
    /// Of the eligible, those connected now.
    pub online: u64,
    /// The eligible by hardware and running version, at most [`limits::PREVIEW_GROUPS`].
    pub groups: Vec<PreviewGroup>,
    /// By reason.
    pub excluded: Vec<Excluded>,
}

#[derive(Clone, Debug)]
pub struct PreviewGroup {
    pub hw_id: HwId,
    pub hw_rev: u32,
    /// Empty: never seen. `(other)`: one of more versions than are told apart.
    pub version: String,
    pub devices: u64,
}

#[derive(Clone, Debug)]
pub struct Excluded {
    /// A stable word, see [`Unfit::as_str`].
    pub reason: &'static str,
    pub devices: u64,
    /// Up to 5 of them.
    pub examples: Vec<DeviceId>,
}

#[derive(Default)]
struct Tally {
    preview: Preview,
    groups: BTreeMap<(HwId, u32, String), u64>,
    excluded: BTreeMap<Unfit, Excluded>,
}

/// Judges every device of `target`, without changing anything. `release` need not be published.
pub async fn preview(
    db: &Db,
    release: &ReleaseRow,
    target: &Target,
    action: RolloutAction,
    route: &Route,
) -> Result<Preview, RolloutError> {
    let mut tally = Tally::default();
    match target.ids()? {
        Some(ids) => {
            for page in ids.chunks(limits::ENROL_ROWS) {
                let found = states::load(db, &mut db.reader(), page).await?;
                let online = route.online(page).await;
                for id in page {
                    match found.iter().find(|state| state.record.client_id == *id) {
                        Some(state) => tally.add(release, action, &state.record, &online),
                        None => tally.exclude(Unfit::UnknownDevice, id),
                    }
                }
            }
        }
        None => {
            let mut filter = DeviceFilter {
                product: Some(release.product.clone()),
                after: None,
                limit: limits::PAGE_MAX,
            };
            loop {
                let page = db.list_devices(&filter).await?;
                let ids: Vec<DeviceId> =
                    page.iter().map(|record| record.client_id.clone()).collect();
                let online = route.online(&ids).await;
                for record in &page {
                    tally.add(release, action, record, &online);
                }
                let Some(last) = page
                    .last()
                    .filter(|_| page.len() == limits::PAGE_MAX as usize)
                else {
                    break;
                };
                filter.after = Some(last.client_id.clone());
            }
        }
    }
    Ok(tally.done())
}

impl Tally {
    fn add(
        &mut self,
        release: &ReleaseRow,
        action: RolloutAction,
        device: &DeviceRecord,
        online: &HashSet<DeviceId>,
    ) {
        if let Err(unfit) = judge(release, action, device) {
            return self.exclude(unfit, &device.client_id);
        }
        self.preview.eligible += 1;
        self.preview.online += u64::from(online.contains(&device.client_id));
        let mut key = (
            device.hw_id.clone(),
            device.hw_rev,
            device.current.version.clone(),
        );
        if self.groups.len() >= limits::PREVIEW_GROUPS && !self.groups.contains_key(&key) {
            "(other)".clone_into(&mut key.2);
        }
        *self.groups.entry(key).or_default() += 1;
    }

    fn exclude(&mut self, unfit: Unfit, device: &DeviceId) {
        let new = || Excluded {
            reason: unfit.as_str(),
            devices: 0,
            examples: Vec::new(),
        };
        let excluded = self.excluded.entry(unfit).or_insert_with(new);
        excluded.devices += 1;
        if excluded.examples.len() < 5 {
            excluded.examples.push(device.clone());
        }
    }

    fn done(self) -> Preview {
        let group = |((hw_id, hw_rev, version), devices)| PreviewGroup {
            hw_id,
            hw_rev,
            version,
            devices,
        };
        Preview {
            groups: self.groups.into_iter().map(group).collect(),
            excluded: self.excluded.into_values().collect(),
            ..self.preview
        }
    }
}
