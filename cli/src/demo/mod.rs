//! `fwpush demo`: a server and a fleet of simulated devices in this process, and a release that reaches them. With
//! `--nodes`, servers of a cluster in processes of their own, one of which is killed on the way.
//!
//! Nothing here is special to the demo but the devices' boards: the installation is `fwpush init`'s, the server is `fwpush
//! serve`'s, the releases go the way of `fwpush release`, and the devices run the real agent over real TLS.

mod cluster;
mod image;
mod limits;
mod site;
mod words;

use std::{
    collections::BTreeSet,
    env,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use device_sim::{FaultShares, Fleet, FleetConfig, Outcomes, Report, Snapshot};
use fwpush_keys::DeviceId;
use semver::Version;
use tempfile::TempDir;
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::{
    cluster::{Engines, Loss},
    site::{Model, Servers, Site},
};
use crate::{
    Context,
    args::{DemoArgs, LogFormat, ManifestArgs, ReleaseRun, SigningArgs},
    client::Client,
    failure::{Doing as _, Failure, Result},
    output::plural,
    progress, release, rollout, serve,
    values::{Expiry, HwFilter, Target},
};

/// What the devices run at first, what they are brought to, and what comes up unhealthy.
const FACTORY: Version = Version::new(1, 0, 0);
const GOOD: Version = Version::new(1, 1, 0);
const BAD: Version = Version::new(1, 2, 0);

/// Enough to be seen in a small fleet, few enough that the latencies still say something.
const FAULTS: FaultShares = FaultShares {
    lost_link: 0.2,
    corrupt_group: 0.2,
    defer: 0.0,
    reject: 0.0,
    bad_health: 0.0,
    restart: 0.0,
};

/// Runs the command. Fails unless every device ended as expected.
pub async fn run(context: &Context, args: &DemoArgs) -> Result<()> {
    // Only on demand: a thousand devices have much to say.
    if ["FWPUSH_LOG", "RUST_LOG"]
        .iter()
        .any(|name| env::var_os(name).is_some())
    {
        serve::init_log(LogFormat::Text)?;
    }
    let mut interrupts = Interrupts::new()?;
    let mut shown = tokio::select! {
        shown = Box::pin(show(context, args)) => shown?,
        // The temporary directory goes with the future.
        () = interrupts.next() => return Err(Failure::new("interrupted")),
    };
    if args.keep {
        let metrics = shown.site.servers.metrics_addresses()?;
        let words = words::to_try(shown.dir.path(), &shown.image, &metrics);
        context.out.say(&words);
        interrupts.next().await;
        context.out.say("Stopping.");
    }
    shown.fleet.stop().await;
    shown.site.servers.drain_and_stop().await;
    shown.results.verdict()
}

/// What is up when everything has been shown.
struct Shown {
    site: Site,
    fleet: Fleet,
    /// The image of the good release.
    image: PathBuf,
    results: Results,
    dir: Dir,
}

async fn show(context: &Context, args: &DemoArgs) -> Result<Shown> {
    let images = Images::plan(args)?;
    // One for a device, one for the server's side of it.
    device_sim::raise_open_files(2 * u64::from(args.devices))
        .doing(|| "make room for the devices".to_owned())?;
    // Whether they can be had shows before anything is made.
    let engines = match args.nodes {
        1 => None,
        _ => {
            context
                .out
                .say("Starting a private Redis and a private PostgreSQL.");
            Some(Engines::start().await?)
        }
    };
    let dir = Dir::new(context.dir())?;
    let context = &Context::new(Some(dir.path().to_owned()), context.out);
    context.out.say(&format!(
        "Making certificates and keys in {} and starting {}.",
        dir.path().display(),
        match args.nodes {
            1 => "a server".to_owned(),
            nodes => format!("{nodes} nodes"),
        }
    ));
    let model = Model::new()?;
    let mut site = match engines {
        None => Site::start(dir.path(), &model).await?,
        Some(engines) => Site::start_cluster(dir.path(), &model, args.nodes, engines).await?,
    };
    let fleet = start_fleet(&site, &model, args, &images).await?;
    let spread: Vec<String> = fleet
        .snapshot()
        .servers
        .values()
        .map(usize::to_string)
        .collect();
    context.out.say(&format!(
        "{} are connected{} and run {FACTORY}. Releasing {GOOD}.",
        plural(args.devices.into(), "device"),
        match args.nodes {
            1 => String::new(),
            _ => format!(" ({} on the nodes)", spread.join(", ")),
        }
    ));

    let image = images.good(dir.path())?;
    let good = Step {
        version: GOOD,
        image: &image,
        size: images.size,
    };
    let Site { servers, client } = &mut site;
    let losing = lose_a_node(context, servers, &fleet, &good);
    let updating = update(context, client, &model, &fleet, &good);
    let (outcomes, loss) = tokio::try_join!(updating, losing)?;
    let mut results = Results::new(fleet.report(&GOOD), outcomes);
    if let Some(loss) = loss {
        results.lost(&loss, loss.stranded(&fleet).await, &fleet);
    }
    if args.faults {
        results.faults = Some(words::Faults {
            counts: fleet.snapshot().counts,
            rolled_back: 0,
        });
        context.out.say(&format!(
            "Now {BAD}, which comes up unhealthy on every device and must roll back."
        ));
        let bad = image::generate(
            dir.path(),
            "gateway-1.2.0.img",
            images.bad_size(),
            args.seed,
        )?;
        let bad = Step {
            version: BAD,
            image: &bad,
            size: images.bad_size(),
        };
        results.rolled_back(update(context, &mut site.client, &model, &fleet, &bad).await?);
    }
    let mut report =
        serde_json::to_value(&results.report).doing(|| "write the report".to_owned())?;
    if let Some(lost) = &results.lost {
        report["node_killed"] = lost.figures();
    }
    let table = words::table(
        &results.report,
        results.faults.as_ref(),
        results.lost.as_ref(),
    );
    if context.out.json {
        context.out.say(table.trim_end());
    }
    context.out.data(|| report, || table.clone())?;
    Ok(Shown {
        site,
        fleet,
        image,
        results,
        dir,
    })
}

/// The directory of the installation: the one that was named, or one that goes away with the demo.
enum Dir {
    Kept(PathBuf),
    Temporary(TempDir),
}

impl Dir {
    fn new(kept: Option<&Path>) -> Result<Self> {
        if let Some(dir) = kept {
            return Ok(Self::Kept(dir.to_owned()));
        }
        let dir = tempfile::Builder::new().prefix("fwpush-demo-").tempdir();
        Ok(Self::Temporary(
            dir.doing(|| "make a temporary directory".to_owned())?,
        ))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(dir) => dir.path(),
        }
    }
}

/// Which images there will be.
struct Images {
    named: Option<PathBuf>,
    size: u64,
    seed: u64,
}

impl Images {
    /// Fails before anything is made when the devices have no room for them.
    fn plan(args: &DemoArgs) -> Result<Self> {
        let size = match &args.image {
            Some(path) => image::size_of(path)?,
            None if args.size.0 == 0 => {
                return Err(Failure::usage("--size must be at least 1 byte"));
            }
            None => args.size.0,
        };
        let images = Self {
            named: args.image.clone(),
            size,
            seed: args.seed,
        };
        let of_each = size.saturating_add(if args.faults { images.bad_size() } else { 0 });
        let processes = if args.nodes > 1 { args.nodes } else { 0 };
        image::check_memory(args.devices, of_each, processes)?;
        Ok(images)
    }

    fn bad_size(&self) -> u64 {
        self.size.min(limits::BAD_IMAGE_BYTES)
    }

    fn good(&self, dir: &Path) -> Result<PathBuf> {
        match &self.named {
            Some(path) => Ok(path.clone()),
            None => image::generate(dir, "gateway-1.1.0.img", self.size, self.seed),
        }
    }
}

/// Adds the devices, starts them, and waits until all are connected.
async fn start_fleet(
    site: &Site,
    model: &Model,
    args: &DemoArgs,
    images: &Images,
) -> Result<Fleet> {
    let pki = site.add_devices(model, args.devices).await?;
    let servers = site.servers.device_addresses();
    let (product, hw_id) = (model.product.clone(), model.hw_id.clone());
    let mut config = FleetConfig::new(servers, pki, product, hw_id, model.channel.clone());
    config.version = FACTORY;
    config.seed = args.seed;
    config.slot_capacity = images.size.max(config.slot_capacity);
    if args.nodes > 1 {
        let slowest = (images.size / limits::CLUSTER_DOWNLOAD_S).max(1);
        config.bandwidth = Some(slowest..=images.size);
    }
    if args.faults {
        config.faults = FAULTS;
        config.bad_versions = BTreeSet::from([BAD]);
    }
    let fleet = Fleet::start(config).doing(|| "start the devices".to_owned())?;
    let bar = progress::count_bar("connecting", args.devices.into());
    let all_online = |now: &Snapshot| {
        bar.set_position(now.online as u64);
        now.online == now.devices
    };
    let time = limits::READY_TIME + limits::READY_TIME_PER_DEVICE * args.devices;
    let connected = fleet.wait_until(all_online, time).await;
    bar.finish_and_clear();
    connected.doing(|| "wait for all devices to connect".to_owned())?;
    Ok(fleet)
}

/// One release of the demo.
struct Step<'a> {
    version: Version,
    image: &'a Path,
    size: u64,
}

impl Step<'_> {
    /// What it may take until every device has ended.
    fn time(&self, fleet: &Fleet) -> Duration {
        let bytes = self.size.saturating_mul(fleet.snapshot().devices as u64);
        limits::UPDATE_TIME + Duration::from_secs(bytes / limits::BYTES_PER_SECOND)
    }
}

/// Kills a node in the middle of the update, where there are several.
async fn lose_a_node(
    context: &Context,
    servers: &mut Servers,
    fleet: &Fleet,
    step: &Step<'_>,
) -> Result<Option<Loss>> {
    let Servers::Nodes(cluster) = servers else {
        return Ok(None);
    };
    let time = step.time(fleet);
    let loss = cluster.lose_one(fleet, &step.version, time).await?;
    context.out.say(&match &loss {
        Some(loss) => format!(
            "Killed {}, which had {}. Unfinished in all: {}.",
            loss.node,
            plural(loss.devices() as u64, "device"),
            loss.unfinished
        ),
        None => {
            "No node was killed: a third of the devices did not have the image in time.".to_owned()
        }
    });
    Ok(loss)
}

/// Releases an image as `fwpush release` does, shows the rollout's progress, and waits until every device has ended.
async fn update(
    context: &Context,
    client: &mut Client,
    model: &Model,
    fleet: &Fleet,
    step: &Step<'_>,
) -> Result<Outcomes> {
    let args = release_args(model, step);
    let starting = || fleet.mark_release_start(Instant::now());
    let released = release::run::release(context, client, &args, starting).await?;
    let mut shown = Box::pin(rollout::follow(client, &released.rollout));
    let ended = fleet.wait_for(&step.version, step.time(fleet));
    tokio::pin!(ended);
    let outcomes = tokio::select! {
        outcomes = &mut ended => outcomes,
        shown = &mut shown => {
            shown?;
            return Ok(ended.await);
        }
    };
    // The devices are the judges; what the server thinks of it is for the eye.
    let last_word = match fleet.servers().len() {
        1 => limits::LAST_WORD_TIME,
        _ => limits::CLUSTER_LAST_WORD_TIME,
    };
    match tokio::time::timeout(last_word, shown).await {
        Ok(shown) => drop(shown?),
        Err(_) if outcomes.unexpected.is_empty() => {
            return Err(Failure::new(
                "every device has ended, but the server does not say that the rollout has",
            ));
        }
        Err(_) => {}
    }
    Ok(outcomes)
}

fn release_args(model: &Model, step: &Step<'_>) -> ReleaseRun {
    ReleaseRun {
        file: step.image.to_owned(),
        manifest: ManifestArgs {
            product: model.product.clone(),
            version: step.version.clone(),
            hw: vec![HwFilter {
                id: model.hw_id.clone(),
                rev_min: 0,
                rev_max: u32::MAX,
            }],
            channel: model.channel.clone(),
            security_counter: None,
            expires: Expiry::YEAR,
            seq: None,
            from_min: None,
            from_max: None,
            min_agent: None,
            class: None,
            advisory_url: None,
        },
        signing: SigningArgs::default(),
        to: Target::All,
        dry_run: false,
        yes: true,
        // The demo follows the rollout itself, with an eye on the devices.
        detach: true,
    }
}

/// What came of it all.
struct Results {
    report: Report,
    /// With `--faults`.
    faults: Option<words::Faults>,
    /// With `--nodes`.
    lost: Option<words::Lost>,
    /// Devices that ended otherwise than they should have, and how.
    unexpected: Vec<(DeviceId, String)>,
}

impl Results {
    fn new(report: Report, outcomes: Outcomes) -> Self {
        let mut results = Self {
            report,
            faults: None,
            lost: None,
            unexpected: Vec::new(),
        };
        results.add(outcomes);
        results
    }

    fn rolled_back(&mut self, outcomes: Outcomes) {
        if let Some(faults) = &mut self.faults {
            faults.rolled_back = outcomes.as_expected;
        }
        self.add(outcomes);
    }

    fn lost(&mut self, loss: &Loss, stranded: Vec<DeviceId>, fleet: &Fleet) {
        self.lost = Some(words::Lost {
            node: loss.node.clone(),
            devices: loss.devices(),
            moved: loss.devices() - stranded.len(),
            unfinished: loss.unfinished,
            longest_offline: fleet.snapshot().longest_offline,
        });
        let why = format!("on no other node since {} was killed", loss.node);
        self.add(Outcomes {
            as_expected: 0,
            unexpected: stranded.into_iter().map(|id| (id, why.clone())).collect(),
        });
    }

    fn add(&mut self, outcomes: Outcomes) {
        let known: BTreeSet<_> = self.unexpected.iter().map(|(id, _)| id.clone()).collect();
        self.unexpected.extend(
            outcomes
                .unexpected
                .into_iter()
                .filter(|(id, _)| !known.contains(id)),
        );
        // A device that went wrong in any step has failed.
        self.report.failed = self.unexpected.len() as u64;
        self.report.succeeded = self.report.devices - self.report.failed;
    }

    fn verdict(self) -> Result<()> {
        if self.unexpected.is_empty() {
            return Ok(());
        }
        let count = self.unexpected.len();
        let devices = Outcomes {
            as_expected: 0,
            unexpected: self.unexpected,
        };
        Err(Failure::new(format!("{count} of {} devices did not end as expected:\n{devices}", self.report.devices))
            .next("The same --seed brings the same faults. FWPUSH_LOG=fwpush_device=info shows what the agents do."))
    }
}

/// Ctrl-C and SIGTERM.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).doing(|| "listen for signals".to_owned());
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests;
