//! `fwpush cluster`.

use fwpush_proto::v1::GetClusterStatusRequest;

use crate::{
    Context,
    args::{ClusterArgs, ClusterCommand},
    failure::{Failure, Result},
    views,
};

/// Runs the command.
pub async fn run(context: &Context, args: &ClusterArgs) -> Result<()> {
    match &args.command {
        ClusterCommand::Status(_) => status(context).await,
    }
}

async fn status(context: &Context) -> Result<()> {
    let client = context.client().await?;
    let status = client
        .call("look at the cluster", async |admin| {
            admin.get_cluster_status(GetClusterStatusRequest {}).await
        })
        .await?;
    context.out.data(
        || views::cluster_json(&status),
        || views::cluster_text(&status),
    )?;
    let away: Vec<&str> = status
        .engines
        .iter()
        .filter(|engine| !engine.up)
        .map(|engine| engine.name.as_str())
        .collect();
    if away.is_empty() {
        return Ok(());
    }
    let names = away.join(" and ");
    Err(
        Failure::new(format!("{names}: no answer to node {}", status.node_id)).next(
            "Devices stay connected meanwhile; the server's log says what else goes on. Look at what does not answer.",
        ),
    )
}
