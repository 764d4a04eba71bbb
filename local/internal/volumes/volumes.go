// Package volumes gives PersistentVolumeClaims directories under the data directory.
//
// The controller manager's own host-path provisioner always writes to /tmp/hostpath_pv, with the mode of
// whoever came first: on a machine with two users the second one's claims stay Pending for ever, silently.
package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// provisionerName is what claims and volumes are marked with. A prefix other than kubernetes.io/ keeps
// the controller manager from deleting our volumes with its own host-path plugin.
const provisionerName = "tuneward.dev/local"

// className is the default StorageClass.
const className = "local"

const (
	annotationProvisioner  = "volume.kubernetes.io/storage-provisioner"
	annotationSelectedNode = "volume.kubernetes.io/selected-node"
	annotationProvisioned  = "pv.kubernetes.io/provisioned-by"
)

// Provisioner makes and removes the directories.
type Provisioner struct {
	client kubernetes.Interface
	root   string
	logf   func(string, ...any)
	queue  workqueue.TypedRateLimitingInterface[task]
}

// task is a claim to serve, or a volume to remove.
type task struct{ namespace, claim, volume string }

// New registers for changes; Run does the work. root is the directory that holds the volumes.
func New(client kubernetes.Interface, factory informers.SharedInformerFactory, root string, logf func(string, ...any)) (*Provisioner, error) {
	p := &Provisioner{
		client: client, root: root, logf: logf,
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[task]()),
	}
	_, claimErr := factory.Core().V1().PersistentVolumeClaims().Informer().AddEventHandler(onChange(func(object any) {
		if claim, ok := object.(*corev1.PersistentVolumeClaim); ok && Wanted(claim) {
			p.queue.Add(task{namespace: claim.Namespace, claim: claim.Name})
		}
	}))
	_, volumeErr := factory.Core().V1().PersistentVolumes().Informer().AddEventHandler(onChange(func(object any) {
		if volume, ok := object.(*corev1.PersistentVolume); ok && released(volume) {
			p.queue.Add(task{volume: volume.Name})
		}
	}))
	return p, errors.Join(claimErr, volumeErr)
}

func onChange(handle func(any)) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    handle,
		UpdateFunc: func(_, object any) { handle(object) },
	}
}

// Wanted tells whether the scheduler has chosen a node for a claim of ours that has no volume yet.
func Wanted(claim *corev1.PersistentVolumeClaim) bool {
	return claim.Spec.VolumeName == "" && claim.DeletionTimestamp == nil &&
		claim.Annotations[annotationProvisioner] == provisionerName &&
		claim.Annotations[annotationSelectedNode] != ""
}

func released(volume *corev1.PersistentVolume) bool {
	return volume.Status.Phase == corev1.VolumeReleased &&
		volume.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete &&
		volume.Annotations[annotationProvisioned] == provisionerName
}

// EnsureClass makes the default StorageClass, and leaves one that is there: it may be the user's choice.
func EnsureClass(ctx context.Context, client kubernetes.Interface) error {
	mode := storagev1.VolumeBindingWaitForFirstConsumer
	reclaim := corev1.PersistentVolumeReclaimDelete
	_, err := client.StorageV1().StorageClasses().Create(ctx, &storagev1.StorageClass{
		ObjectMeta: metav1.ObjectMeta{
			Name:        className,
			Annotations: map[string]string{"storageclass.kubernetes.io/is-default-class": "true"},
		},
		Provisioner:       provisionerName,
		VolumeBindingMode: &mode,
		ReclaimPolicy:     &reclaim,
	}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// Run works until the context ends.
func (p *Provisioner) Run(ctx context.Context) {
	go func() {
		<-ctx.Done()
		p.queue.ShutDown()
	}()
	for {
		next, quit := p.queue.Get()
		if quit {
			return
		}
		if err := p.do(ctx, next); err != nil {
			p.logf("volumes: %+v: %v", next, err)
			p.queue.AddRateLimited(next)
		} else {
			p.queue.Forget(next)
		}
		p.queue.Done(next)
	}
}

func (p *Provisioner) do(ctx context.Context, t task) error {
	if t.volume != "" {
		return p.remove(ctx, t.volume)
	}
	claim, err := p.client.CoreV1().PersistentVolumeClaims(t.namespace).Get(ctx, t.claim, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && !Wanted(claim) {
		return nil
	}
	if err != nil {
		return err
	}
	return p.provision(ctx, claim)
}

func (p *Provisioner) provision(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	volume := Volume(claim, p.root)
	path := volume.Spec.HostPath.Path
	if err := os.MkdirAll(path, 0o777); err != nil {
		return err
	}
	// The kubelet applies no fsGroup to host paths, so whoever a pod runs as may write. Chmod, since the
	// umask takes bits from MkdirAll.
	if err := os.Chmod(path, 0o777|os.ModeSetgid); err != nil {
		return err
	}
	_, err := p.client.CoreV1().PersistentVolumes().Create(ctx, volume, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// Volume is the volume for a claim. Its name comes from the claim's UID, so a second try makes no second one.
func Volume(claim *corev1.PersistentVolumeClaim, root string) *corev1.PersistentVolume {
	kind := corev1.HostPathDirectory
	directory := fmt.Sprintf("%s-%s-%.8s", claim.Namespace, claim.Name, claim.UID)
	volume := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{
			Name:        "pvc-" + string(claim.UID),
			Annotations: map[string]string{annotationProvisioned: provisionerName},
		},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: claim.Spec.Resources.Requests[corev1.ResourceStorage]},
			AccessModes:                   claim.Spec.AccessModes,
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
			VolumeMode:                    claim.Spec.VolumeMode,
			ClaimRef: &corev1.ObjectReference{
				APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID,
			},
		},
	}
	if claim.Spec.StorageClassName != nil {
		volume.Spec.StorageClassName = *claim.Spec.StorageClassName
	}
	volume.Spec.HostPath = &corev1.HostPathVolumeSource{Path: filepath.Join(root, directory), Type: &kind}
	return volume
}

func (p *Provisioner) remove(ctx context.Context, name string) error {
	volumes := p.client.CoreV1().PersistentVolumes()
	volume, err := volumes.Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && !released(volume) {
		return nil
	}
	if err != nil {
		return err
	}
	// The path is in an object users may write; only what lies right under our directory is ours to delete.
	if path := volume.Spec.HostPath; path != nil && filepath.Dir(path.Path) == p.root {
		if err := os.RemoveAll(path.Path); err != nil {
			return err
		}
	}
	err = volumes.Delete(ctx, name, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
