#!/usr/bin/env bash
# pydicom's apply_modality_lut, and apply_rescale, the same function, return the stored values of an
# enhanced CT unchanged: they look for Rescale Slope and Rescale Intercept in the top level of the
# dataset only, but an enhanced image has them in the Pixel Value Transformation Sequence of its
# functional groups (DICOM PS3.3 C.7.6.16.2.9, for CT C.8.15.3.10). There is no error or warning.
#
# Version: pydicom 3.0.2, the newest on PyPI (numpy 2.4.6, Python 3.11, Linux)
# Seen:    2026-11-30
# Output:  stored values: [[24, 1024, 2024]]
#          classic CT: [[-1000.0, 0.0, 1000.0]]
#          enhanced CT: [[24, 1024, 2024]]
#          enhanced CT, by the item of its functional group: [[-1000.0, 0.0, 1000.0]]
#          warnings: 0
#
# Why it surprises: pydicom's guide gives apply_modality_lut as the way from raw values to
# Hounsfield units. The same pixels, slope 1 and intercept -1024 give these from a classic CT, and
# values 1024 too high from an enhanced one, which look plausible. The documentation asks for "a
# dataset containing a Modality LUT Module" and says that without slope and intercept the array is
# returned unchanged; it says nothing about functional groups. Passing the item of the Pixel Value
# Transformation Sequence in place of the dataset works.
#
# Both images are made here; dciodvfy (dicom3tools 1.00~20220618093127) finds no error in either.
# Reported by others on 2026-08-21: https://github.com/pydicom/pydicom/issues/2353
#
# Exits with 0 while pydicom behaves so, and with 1 once it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2 numpy==2.4.6
cat > "$folder/check.py" <<'PYTHON'
import sys
import warnings

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_modality_lut, apply_rescale
from pydicom.uid import (CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian,
                         generate_uid)


def dataset(**attributes):
    result = Dataset()
    for name, value in attributes.items():
        setattr(result, name, value)
    return result


STORED = np.array([[24, 1024, 2024]], '<u2')  # air, water and bone
HOUNSFIELD = [[-1000, 0, 1000]]
RESCALE = dict(RescaleSlope=1, RescaleIntercept=-1024, RescaleType='HU')
PLANE = [dict(ImagePositionPatient=[0, 0, 0]), dict(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
         dict(PixelSpacing=[1, 1], SliceThickness=1)]
WINDOW = dict(WindowCenter=0, WindowWidth=2000)
IMAGE_TYPE = ['DERIVED', 'PRIMARY', 'VOLUME', 'NONE']
ORGANIZATION = dict(DimensionOrganizationUID=generate_uid())
FRAME_TYPE = dict(PixelPresentation='MONOCHROME', VolumetricProperties='VOLUME',
                  VolumeBasedCalculationTechnique='NONE')
COMMON = dict(
    PatientName='', PatientID='1', PatientBirthDate='', PatientSex='', StudyID='1',
    StudyDate='20260101', StudyTime='000000', AccessionNumber='', ReferringPhysicianName='',
    StudyInstanceUID=generate_uid(), Modality='CT', SeriesNumber=1, InstanceNumber=1,
    PatientPosition='HFS', BodyPartExamined='HEAD', Manufacturer='none',
    FrameOfReferenceUID=generate_uid(), PositionReferenceIndicator='', Rows=1, Columns=3,
    SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2', BitsAllocated=16, BitsStored=16,
    HighBit=15, PixelRepresentation=0)
CLASSIC = dict(
    **PLANE[0], **PLANE[1], **PLANE[2], **WINDOW, **RESCALE,
    ImageType=['DERIVED', 'PRIMARY', 'AXIAL'], KVP=None, AcquisitionNumber=None)
SHARED = dataset(
    PlanePositionSequence=[dataset(**PLANE[0])], PlaneOrientationSequence=[dataset(**PLANE[1])],
    PixelMeasuresSequence=[dataset(**PLANE[2])], FrameVOILUTSequence=[dataset(**WINDOW)],
    PixelValueTransformationSequence=[dataset(**RESCALE)],
    FrameAnatomySequence=[dataset(FrameLaterality='U', AnatomicRegionSequence=[dataset(
        CodeValue='69536005', CodingSchemeDesignator='SCT', CodeMeaning='Head')])],
    CTImageFrameTypeSequence=[dataset(FrameType=IMAGE_TYPE, **FRAME_TYPE)],
    IrradiationEventIdentificationSequence=[dataset(IrradiationEventUID=generate_uid())])
ENHANCED = dict(
    **FRAME_TYPE, ImageType=IMAGE_TYPE, ContentQualification='RESEARCH', NumberOfFrames=1,
    SharedFunctionalGroupsSequence=[SHARED],
    PerFrameFunctionalGroupsSequence=[dataset(
        FrameContentSequence=[dataset(DimensionIndexValues=1)])],
    DimensionOrganizationSequence=[dataset(**ORGANIZATION)],
    DimensionIndexSequence=[dataset(
        **ORGANIZATION, DimensionIndexPointer=0x00200032, FunctionalGroupPointer=0x00209113)],
    ContentDate='20260101', ContentTime='000000', AcquisitionContextSequence=[],
    ManufacturerModelName='none', DeviceSerialNumber='1', SoftwareVersions='1',
    PresentationLUTShape='IDENTITY', BurnedInAnnotation='NO', LossyImageCompression='00')


def saved(name, sop_class, attributes):
    """The image as read back from a file."""
    image = dataset(**COMMON, **attributes, SOPClassUID=sop_class, SOPInstanceUID=generate_uid(),
                    SeriesInstanceUID=generate_uid(), PixelData=STORED.tobytes())
    image.file_meta = dataset(TransferSyntaxUID=ExplicitVRLittleEndian)
    path = f'{sys.argv[1]}/{name}.dcm'
    image.save_as(path, enforce_file_format=True)
    image = dcmread(path)
    assert (image.pixel_array == STORED).all()
    return image


def transformed(name, data):
    """The values of apply_modality_lut and apply_rescale, which must be the same."""
    values = apply_modality_lut(STORED, data)
    assert (apply_rescale(STORED, data) == values).all()
    print(f'{name}: {values.tolist()}')
    return values.tolist()


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    print(f'stored values: {STORED.tolist()}')
    classic = transformed('classic CT', saved('classic', CTImageStorage, CLASSIC))
    image = saved('enhanced', EnhancedCTImageStorage, ENHANCED)
    enhanced = transformed('enhanced CT', image)
    item = image.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0]
    by_item = transformed('enhanced CT, by the item of its functional group', item)
print(f'warnings: {len(caught)}')
holds = classic == by_item == HOUNSFIELD and enhanced == STORED.tolist() and not caught
raise SystemExit(0 if holds else 1)
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder"
