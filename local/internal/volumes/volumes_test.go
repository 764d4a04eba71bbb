package volumes

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func claim() *corev1.PersistentVolumeClaim {
	class := className
	return &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "a", Name: "store", UID: "01234567-89ab",
			Annotations: map[string]string{annotationProvisioner: provisionerName, annotationSelectedNode: "local"},
		},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteMany}, StorageClassName: &class,
		},
	}
}

func TestAClaimIsServedOnceTheSchedulerHasChosenANode(t *testing.T) {
	if !Wanted(claim()) {
		t.Error("it is not served")
	}
	for name, change := range map[string]func(*corev1.PersistentVolumeClaim){
		"no node yet":         func(c *corev1.PersistentVolumeClaim) { delete(c.Annotations, annotationSelectedNode) },
		"another's":           func(c *corev1.PersistentVolumeClaim) { c.Annotations[annotationProvisioner] = "else" },
		"bound":               func(c *corev1.PersistentVolumeClaim) { c.Spec.VolumeName = "pv" },
		"about to be deleted": func(c *corev1.PersistentVolumeClaim) { c.DeletionTimestamp = &metav1.Time{} },
	} {
		changed := claim()
		change(changed)
		if Wanted(changed) {
			t.Errorf("%s: it is served", name)
		}
	}
}

func TestAVolumeFitsItsClaimAndLiesInTheDirectory(t *testing.T) {
	volume := Volume(claim(), "/data/volumes")
	if path := volume.Spec.HostPath.Path; path != "/data/volumes/a-store-01234567" {
		t.Error(path)
	}
	if reference := volume.Spec.ClaimRef; reference.UID != claim().UID || reference.Namespace != "a" || reference.Name != "store" {
		t.Errorf("%+v", reference)
	}
	if volume.Spec.StorageClassName != className || volume.Spec.AccessModes[0] != corev1.ReadWriteMany {
		t.Errorf("%+v", volume.Spec)
	}
}

func TestOnlyReleasedVolumesOfOursAreRemoved(t *testing.T) {
	volume := Volume(claim(), "/data/volumes")
	volume.Status.Phase = corev1.VolumeReleased
	if !released(volume) {
		t.Error("it is kept")
	}
	volume.Status.Phase = corev1.VolumeBound
	if released(volume) {
		t.Error("a bound volume is removed")
	}
	volume.Status.Phase = corev1.VolumeReleased
	volume.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
	if released(volume) {
		t.Error("a volume to be retained is removed")
	}
}
