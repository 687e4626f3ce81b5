// Role credentials, as the SDK for Go fetches them.
package main

import (
	"fmt"
	"os"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go/aws/session"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Println(aws.SDKVersion)
		return
	}
	value, err := ec2rolecreds.NewCredentials(session.Must(session.NewSession())).Get()
	if err != nil {
		fmt.Println("error")
		os.Exit(1)
	}
	fmt.Println(value.AccessKeyID)
}
