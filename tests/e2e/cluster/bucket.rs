//! Three nodes, one bucket: an image that was uploaded at one node is served by all of them.

use fwpush_services::{
    RedisOptions,
    s3::{BUCKET, S3, S3Options, SECRET_KEY},
};
use fwpush_tests::{cluster::Cluster, site::in_bucket, wait::until};

use super::{
    all_as_expected, begin_release, nothing_confirmed_is_missing, rollout_complete, spread,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_uploaded_at_one_node_is_fetched_once_by_each_and_outlives_the_bucket() {
    let s3 = S3::start(&S3Options::default()).unwrap();
    let secrets = tempfile::tempdir().unwrap();
    let secret = secrets.path().join("s3.secret");
    std::fs::write(&secret, SECRET_KEY).unwrap();
    let options = RedisOptions::default();
    let started = Cluster::start_with(3, &options, |config| {
        config.insert("files".into(), in_bucket(&s3, secret.to_str().unwrap()));
    });
    let Some(cluster) = started.await else { return };
    let fleet = spread(&cluster, "s3-", 60, |_| {}).await;
    let image = begin_release(&cluster, "1.1.0", 1 << 20);
    all_as_expected(&fleet, "1.1.0", 60).await;
    rollout_complete(&cluster).await;
    let file = blake3::hash(&std::fs::read(&image).unwrap()).to_string();
    let line = format!("GET /{BUCKET}/{}/{file}", &file[..2]);
    let fetched = s3.requests().iter().filter(|seen| **seen == line).count();
    assert_eq!(fetched, 2, "the node that it was uploaded at has it");

    // The bucket is away: what is cached is served on every node, and everything says what is missing.
    s3.stop();
    for node in &cluster.nodes {
        until("the probe to say so", || async {
            let said = node.get("/readyz").1;
            if said == "ready, without the image store\n" {
                Ok(())
            } else {
                Err(said)
            }
        })
        .await;
    }
    let status = cluster.fwpush_at(2, &["cluster", "status", "--json"]);
    assert_eq!(status.code, 1);
    // The rollout is to all: devices that come later join it.
    let newcomers = spread(&cluster, "new-", 12, |_| {}).await;
    all_as_expected(&newcomers, "1.1.0", 12).await;
    nothing_confirmed_is_missing(&cluster, &fleet);
}
