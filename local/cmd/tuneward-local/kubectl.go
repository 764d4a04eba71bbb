package main

import (
	"os"

	_ "k8s.io/client-go/plugin/pkg/client/auth" // the auth plugins of users' own kubeconfigs
	componentcli "k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	kubectlcmd "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
)

// kubectl is upstream's main, so that a machine needs none of its own. It does not return.
func kubectl(args []string) {
	// kubectl reads os.Args in several places (plugins, .kuberc).
	os.Args = append([]string{"kubectl"}, args...)
	_, _ = logs.GlogSetter(kubectlcmd.GetLogVerbosity(os.Args))
	if err := componentcli.RunNoErrOutput(kubectlcmd.NewDefaultKubectlCommand()); err != nil {
		kubectlutil.CheckErr(err)
	}
	os.Exit(0)
}
