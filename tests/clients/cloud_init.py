"""The EC2 datasource of cloud-init: its own crawler, on a platform that is said to be EC2."""
import sys

from cloudinit import helpers
from cloudinit.sources import DataSourceEc2

settings = {"datasource": {"Ec2": {"metadata_urls": [sys.argv[1]], "max_wait": 30, "timeout": 10}}}
paths = helpers.Paths({"cloud_dir": "/nonexistent", "run_dir": "/nonexistent"})
source = DataSourceEc2.DataSourceEc2(settings, None, paths)
source._cloud_name = DataSourceEc2.CloudNames.AWS
crawled = source.crawl_metadata()
print(crawled and crawled["meta-data"]["instance-id"])
print(crawled and len(crawled["user-data"]))
